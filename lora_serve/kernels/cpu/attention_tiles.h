// One tile of keys of paged attention: scores, the online softmax, and weighted values, for some rows of queries.
//
// With few rows (decode) keys and values are used straight from registers (`compare` for q · k, `weigh` for p · v);
// with more, they are widened into buffers first (`load_*`) that all rows read (`multiply*`). Either way a score sums
// over its dimensions in ascending order and an output over its keys, so both give the same bits.
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

// Addresses of the keys or values at a tile's positions, for one head.
struct Places {
    const char* const* first;  // of the unit's first kv head
    int64_t offset;
    const char* operator[](int64_t j) const { return first[j] + offset; }
};

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

// Dimensions from `d` of keys j..j+W, transposed: pair p (of two-byte types; half the shuffles) or dimension p of all
// W keys in block[p]; zeros for keys from n on and dimensions from `dim` on.
template <class T_> INLINE void load_block(Places row, int64_t j, int64_t n, size_t d, size_t dim, V* block) {
    size_t bytes = std::min(sizeof(V), (dim - d) * sizeof(T_));
    if (j + W <= n && bytes == sizeof(V)) {
        UNROLL
        for (int i = 0; i < W; i++) block[i] = load((const float*)(row[j + i] + d * sizeof(T_)));
    } else {
        UNROLL
        for (int i = 0; i < W; i++) {
            V part = {};  // a copy of unknown length would keep all of `block` out of the registers
            if (j + i < n) memcpy(&part, row[j + i] + d * sizeof(T_), bytes);
            block[i] = part;
        }
    }
    transpose(block);
}

// keys[dim][KEYS] = n rows of T_, transposed and widened (Dot: [pair of dim][KEYS], not widened); zeros from row n on.
template <class T_, bool Dot> void load_keys(Places row, Places next, int64_t n, size_t dim, float* keys) {
    constexpr size_t EACH = 4 / sizeof(T_);
    for (int64_t j = 0; j < KEYS; j += W)
        for (size_t d = 0; d < dim; d += W * EACH) {
            V block[W];
            load_block<T_>(row, j, n, d, dim, block);
            UNROLL
            for (int i = 0; i < W; i++) {
                __builtin_prefetch(next[j + i] + d * sizeof(T_), 0, 2);
                if constexpr (EACH == 1 || Dot) {
                    store(keys + (d / EACH + i) * KEYS + j, block[i]);
                } else {
                    store(keys + (d + 2 * i) * KEYS + j, first_of_pair<T_>((U)block[i]));
                    store(keys + (d + 2 * i + 1) * KEYS + j, second_of_pair<T_>((U)block[i]));
                }
            }
        }
}

// sum[T] += q[T rows of kd] * key: one dimension of W keys (score_element), or a pair of dimensions (score_pair).
template <int T> INLINE void score_element(V* sum, V key, const float* q, size_t kd) {
    UNROLL
    for (int t = 0; t < T; t++) sum[t] += key * q[t * kd];
}
template <int T> INLINE void score_pair(V* sum, U key, const float* q, size_t kd) {
    UNROLL
    for (int t = 0; t < T; t++) {
        uint32_t pair;
        memcpy(&pair, q + t * kd, sizeof pair);
        sum[t] = dot_pair(sum[t], key, U{} + pair);
    }
}

// Scores of few rows: score[rows, KEYS] = q[rows, dim] . n keys of T_, transposed and widened in registers.
template <class T_, bool Dot>
void compare(int64_t rows, const float* q, size_t kd, Places row, int64_t n, size_t dim, float* score) {
    constexpr size_t EACH = 4 / sizeof(T_);
    with_rows((int)rows, [&](auto t_) {
        constexpr int T = decltype(t_)::value;
        for (int64_t j = 0; j < n; j += W) {
            V sum[T] = {};
            for (size_t d = 0; d < dim; d += W * EACH) {
                V block[W];
                load_block<T_>(row, j, n, d, dim, block);
                UNROLL
                for (int i = 0; i < W; i++) {
                    if constexpr (Dot) {
                        score_pair<T>(sum, (U)block[i], q + d / 2 + i, kd);
                    } else if constexpr (EACH == 1) {
                        score_element<T>(sum, block[i], q + d + i, kd);
                    } else {
                        score_element<T>(sum, first_of_pair<T_>((U)block[i]), q + d + 2 * i, kd);
                        score_element<T>(sum, second_of_pair<T_>((U)block[i]), q + d + 2 * i + 1, kd);
                    }
                }
            }
            UNROLL
            for (int t = 0; t < T; t++) store(score + t * KEYS + j, sum[t]);
        }
    });
}

// score[rows, KEYS] = q[rows, pairs] . keys[pairs, KEYS]
void multiply_pairs(int64_t rows, const float* q, size_t kd, const float* keys, size_t pairs, float* score) {
    for (int64_t j = 0; j < KEYS; j += 2 * W)
        for (int64_t row = 0; row < rows; row += TILE)
            with_rows((int)std::min<int64_t>(TILE, rows - row), [&](auto t_) {
                constexpr int T = decltype(t_)::value;
                V left[T] = {}, right[T] = {};
                for (size_t p = 0; p < pairs; p++) {
                    score_pair<T>(left, (U)load(keys + p * KEYS + j), q + row * kd + p, kd);
                    score_pair<T>(right, (U)load(keys + p * KEYS + j + W), q + row * kd + p, kd);
                }
                UNROLL
                for (int t = 0; t < T; t++) {
                    store(score + (row + t) * KEYS + j, left[t]);
                    store(score + (row + t) * KEYS + j + W, right[t]);
                }
            });
}

template <class T_>
void load_values(Places row, Places next, int64_t n, size_t dim, size_t width, float* values) {
    for (int64_t j = 0; j < KEYS; j++) {
        float* to = values + j * width;
        size_t done = 0;
        if (j < n) {
            widen_row((const T_*)row[j], dim, to);
            done = padded(dim);
            for (size_t d = 0; d < dim * sizeof(T_); d += 64) __builtin_prefetch(next[j] + d, 0, 2);
        }
        for (; done < width; done += W) store(to + done, V{});
    }
}

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
// where a largest score has grown.
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
        for (int c = 0; c < N; c++) {
            V p = power_of_two(load(score + t * KEYS + c * W) - base[t]);
            store(score + t * KEYS + c * W, p);
            part += p;
        }
        float *sum = run.sum + (row + t) * W, *out = run.out + (row + t) * run.width;
        store(sum, load(sum) * shrink[t] + part);
        if (shrink[t] != 1.0f)
            for (size_t d = 0; d < run.width; d += W) store(out + d, load(out + d) * shrink[t]);
    }
}

// c[rows, n] = (Add: c +) a[rows, k] @ b[k, n], n a multiple of 2W
template <bool Add>
void multiply(int64_t rows, const float* a, size_t lda, const float* b, size_t n, size_t k, float* c) {
    for (size_t d = 0; d < n; d += 2 * W)
        for (int64_t row = 0; row < rows; row += TILE)
            with_rows((int)std::min<int64_t>(TILE, rows - row), [&](auto t) {
                panel<decltype(t)::value, Add>(a + row * lda, lda, b + d, n, k, c + row * n + d, n);
            });
}

// Loads 2W values in the order that is cheapest for their type (bf16: even ones, then odd ones); `sort_two` restores
// their own order.
template <class T_> INLINE void load_two(const T_* p, V& left, V& right) {
    if constexpr (std::is_same_v<T_, Bf16>) {
        U pairs;
        memcpy(&pairs, p, sizeof pairs);
        left = first_of_pair<Bf16>(pairs);
        right = second_of_pair<Bf16>(pairs);
    } else {
        left = load(p);
        right = load(p + W);
    }
}
template <class T_, int... J> INLINE void sort_two(float* p, std::integer_sequence<int, J...>) {
    if constexpr (std::is_same_v<T_, Bf16>) {
        V left = load(p), right = load(p + W);
        store(p, pick<(J / 2 + J % 2 * W)...>(left, right));
        store(p + W, pick<(W / 2 + J / 2 + J % 2 * W)...>(left, right));
    }
}

// Weighted values of few rows: out[rows, dim] += score[rows, n] @ n values of T_, widened in registers; `dim` is a
// multiple of 2W. The next tile's keys are prefetched here too, spread evenly: the CPU drops prefetches in a burst.
template <class T_>
void weigh(int64_t rows, const float* score, Places row, Places next, Places next_key, int64_t n, size_t dim,
           float* out, size_t width) {
    for (int64_t r = 0; r < rows; r += TILE)
        with_rows((int)std::min<int64_t>(TILE, rows - r), [&](auto t_) {
            constexpr int T = decltype(t_)::value;
            for (size_t d = 0; d < dim; d += 2 * W) {
                V sum[T][2];
                UNROLL
                for (int t = 0; t < T; t++)
                    for (int c = 0; c < 2; c++) sum[t][c] = load(out + (r + t) * width + d + c * W);
                for (int64_t j = 0; j < n; j++) {
                    V left, right;
                    load_two((const T_*)row[j] + d, left, right);
                    __builtin_prefetch(next[j] + d * sizeof(T_), 0, 2);
                    __builtin_prefetch(next_key[j] + d * sizeof(T_), 0, 2);
                    UNROLL
                    for (int t = 0; t < T; t++) {
                        float p = score[(r + t) * KEYS + j];
                        sum[t][0] += left * p;
                        sum[t][1] += right * p;
                    }
                }
                UNROLL
                for (int t = 0; t < T; t++)
                    for (int c = 0; c < 2; c++) store(out + (r + t) * width + d + c * W, sum[t][c]);
            }
        });
}

}  // namespace
