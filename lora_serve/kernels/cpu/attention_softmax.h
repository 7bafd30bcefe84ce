// The online softmax of paged attention: its state for some rows of queries, and one step of it for a tile of keys.
#pragma once
#include <algorithm>
#include <limits>

#include "simd.h"

namespace {

constexpr int64_t KEYS = 32;  // positions in a tile

INLINE V tangent(V x) {  // hyperbolic tangent
    V positive = x < 0 ? -x : x;
    V e = power_of_two(positive * (-2 * LOG2E));
    V value = (1.0f - e) / (1.0f + e);
    return x < 0 ? -value : value;
}

// State of the online softmax of some rows, after some tiles of keys.
struct State {
    float *out, *top, *sum;  // [rows, width], unscaled; largest scores [rows]; W parts of the sums of probabilities [rows, W]
    size_t rows, width;

    State(float*& memory, size_t rows, size_t width) : rows(rows), width(width) {
        out = part_of(memory, rows * width);
        top = part_of(memory, rows + TILE);  // `soften` takes TILE at once
        sum = part_of(memory, rows * W);
    }
    static size_t floats(size_t rows, size_t width) { return rows * (width + W + 1) + TILE + gaps(3); }

    // No keys yet. A sink is a score without a value.
    template <class F> void clear(const float* sinks, F head) {
        std::fill(out, out + rows * width, 0.0f);
        std::fill(sum, sum + rows * W, 0.0f);
        for (size_t r = 0; r < rows; r++) {
            top[r] = sinks ? sinks[head(r)] * LOG2E : -std::numeric_limits<float>::infinity();
            if (sinks) sum[r * W] = 1.0f;
        }
    }
    // Adds the keys of another state.
    void merge(const State& more) {
        for (size_t r = 0; r < rows; r++) {
            V old = V{} + top[r], other = V{} + more.top[r], now = larger(old, other);
            V base = now == V{} - std::numeric_limits<float>::infinity() ? V{} : now;
            V mine = power_of_two(old - base), theirs = power_of_two(other - base);
            top[r] = now[0];
            store(sum + r * W, load(sum + r * W) * mine + load(more.sum + r * W) * theirs);
            for (size_t d = r * width; d < (r + 1) * width; d += W)
                store(out + d, load(out + d) * mine + load(more.out + d) * theirs);
        }
    }
};

// Lane t of the result is the largest lane of r[t], for TILE vectors.
template <int D = W / 2> INLINE V largests(V* r) {
    UNROLL
    for (int i = 0; i < TILE; i++)
        if constexpr (D == TILE) r[i] = larger(r[i], swapped<D>(r[i], Lanes{}));
        else if (i < D) r[i] = larger(low<D>(r[i], r[i + D], Lanes{}), high<D>(r[i], r[i + D], Lanes{}));
    if constexpr (D > 1) return largests<D / 2>(r);
    return r[0];
}

// The keys that a row sees: its sequence's up to its own position, or the last `window` of these.
struct Sight {
    int64_t window, position, share;  // position of row 0; rows per position
    int64_t newest(int64_t row) const { return position + row / share; }
    int64_t oldest(int64_t row) const { return window ? std::max<int64_t>(0, newest(row) - window + 1) : 0; }
};

// The part of a State that is one kv head's.
struct Running {
    float *out, *top, *sum;
    size_t width;
};

// One step of the online softmax, for rows `row`.. < `row` + `rows` <= `row` + TILE and the tile of keys from `first`:
// replaces unscaled scores by probabilities relative to the rows' largest scores so far, and rescales `sum` and `out`
// where a largest score has grown. With Pairs, a row's probabilities become pairs of bf16 in the first half of its place,
// and `sum` sums the rounded ones, so that the weights of values still sum to one.
template <bool Pairs>
INLINE void soften(float scale, float cap, Sight sight, int64_t row, int64_t rows, int64_t first, float* score,
                   Running run) {
    constexpr int N = KEYS / W;
    V low = V{} - std::numeric_limits<float>::infinity(), most[TILE];
    bool whole = first >= sight.oldest(row + rows - 1) && first + KEYS - 1 <= sight.newest(row);
    I lane;
    for (int i = 0; i < W; i++) lane[i] = i;
    for (int t = 0; t < TILE; t++) most[t] = low;
    score += row * KEYS;
    for (int t = 0; t < rows; t++)
        for (int c = 0; c < N; c++) {
            V s = load(score + t * KEYS + c * W) * scale;
            if (cap > 0) s = tangent(s / cap) * (cap * LOG2E);
            if (!whole) {
                int32_t from = (int32_t)(sight.oldest(row + t) - first), to = (int32_t)(sight.newest(row + t) - first);
                s = (lane >= from - c * W) & (lane <= to - c * W) ? s : low;
            }
            store(score + t * KEYS + c * W, s);
            most[t] = larger(most[t], s);
        }
    V old = {}, base, shrink;
    memcpy(&old, run.top + row, TILE * sizeof(float));
    V now = larger(old, largests(most));
    base = now == low ? V{} : now;  // low: no key seen yet
    shrink = power_of_two(old - base);
    memcpy(run.top + row, &now, TILE * sizeof(float));
    for (int t = 0; t < rows; t++) {
        V part = {};
        UNROLL
        for (int c = 0; c < N; c += 1 + Pairs) {
            V p = power_of_two(load(score + t * KEYS + c * W) - base[t]);
            if constexpr (Pairs) {
                U pairs = rounded_pairs(p, power_of_two(load(score + t * KEYS + (c + 1) * W) - base[t]));
                store(score + t * KEYS + c / 2 * W, (V)pairs);
                part += first_of_pair<Bf16>(pairs) + second_of_pair<Bf16>(pairs);
            } else {
                store(score + t * KEYS + c * W, p);
                part += p;
            }
        }
        float *sum = run.sum + (row + t) * W, *out = run.out + (row + t) * run.width;
        store(sum, load(sum) * shrink[t] + part);
        if (shrink[t] != 1.0f)
            for (size_t d = 0; d < run.width; d += W) store(out + d, load(out + d) * shrink[t]);
    }
}

}  // namespace
