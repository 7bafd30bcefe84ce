// One tile of keys of paged attention: scores and weighted values, for some rows of queries.
//
// With few rows (decode) keys and values are used straight from registers (`compare` for q · k, `weigh*` for p · v);
// with more, they are prepared in buffers first (`load_*`) that all rows read (`multiply*`). Either way a score sums
// over its dimensions in ascending order and an output over its keys, so both give the same bits.
//
// Where the CPU multiplies pairs of bf16 (`DOTS`), a score is a sum over pairs of dimensions and an output one over pairs
// of positions, whose probabilities are rounded to bf16 as in GPUs' attention kernels.
#pragma once
#include <algorithm>

#include "attention_softmax.h"

namespace {

// Addresses of the keys or values at a tile's positions, for one head.
struct Places {
    const char* const* first;  // of the unit's first kv head
    int64_t offset;
    const char* operator[](int64_t j) const { return first[j] + offset; }
};

// Prefetches a tile's keys or values while another tile is in use: a vector a step, of all heads of a unit, in the order
// in which they lie in memory, which the CPU reads faster than one head after the other. Evenly spread steps, since it
// drops prefetches in a burst. Loops step a copy of their own, as a compiler keeps only that in registers.
class Prefetch {
    const char* const *place, * const* last;
    const char *at, *end;  // at the current position
    int64_t bytes;         // of a position

  public:
    Prefetch(const char* const (&places)[KEYS], int64_t bytes)
        : place(places), last(places + KEYS), at(nullptr), end(nullptr), bytes(bytes) {}
    void step() {
        if (at >= end) {
            if (place == last) return;
            at = *place++;
            end = at + bytes;
        }
        __builtin_prefetch(at, 0, 2);
        at += sizeof(V);
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
template <class T_, bool Dot> void load_keys(Places row, Prefetch& ahead, int64_t n, size_t dim, float* keys) {
    constexpr size_t EACH = 4 / sizeof(T_);
    Prefetch next = ahead;
    for (int64_t j = 0; j < KEYS; j += W)
        for (size_t d = 0; d < dim; d += W * EACH) {
            V block[W];
            load_block<T_>(row, j, n, d, dim, block);
            UNROLL
            for (int i = 0; i < W; i++) {
                next.step();
                if constexpr (EACH == 1 || Dot) {
                    store(keys + (d / EACH + i) * KEYS + j, block[i]);
                } else {
                    store(keys + (d + 2 * i) * KEYS + j, first_of_pair<T_>((U)block[i]));
                    store(keys + (d + 2 * i + 1) * KEYS + j, second_of_pair<T_>((U)block[i]));
                }
            }
        }
    ahead = next;
}

// sum[T] += q[T rows of kd] * key: one dimension of W keys (add_element), or a pair of dimensions (add_pair). The latter
// also for sum[T] += p[T rows] * value: a pair of positions of W dimensions.
template <int T> INLINE void add_element(V* sum, V key, const float* q, size_t kd) {
    UNROLL
    for (int t = 0; t < T; t++) sum[t] += key * q[t * kd];
}
template <int T> INLINE void add_pair(V* sum, U key, const float* q, size_t kd) {
    UNROLL
    for (int t = 0; t < T; t++) {
        uint32_t pair;
        memcpy(&pair, q + t * kd, sizeof pair);
        sum[t] = dot_pair(sum[t], key, U{} + pair);
    }
}

// Scores of few rows: score[rows, KEYS] = q[rows, dim] . n keys of T_, transposed and widened in registers.
template <class T_, bool Dot>
void compare(int64_t rows, const float* q, size_t kd, Places row, Prefetch& ahead, int64_t n, size_t dim, float* score) {
    constexpr size_t EACH = 4 / sizeof(T_);
    with_rows((int)rows, [&](auto t_) {
        constexpr int T = decltype(t_)::value;
        Prefetch next = ahead;
        for (int64_t j = 0; j < n; j += W) {
            V sum[T] = {};
            for (size_t d = 0; d < dim; d += W * EACH) {
                V block[W];
                load_block<T_>(row, j, n, d, dim, block);
                UNROLL
                for (int i = 0; i < W; i++) {
                    next.step();
                    if constexpr (Dot) {
                        add_pair<T>(sum, (U)block[i], q + d / 2 + i, kd);
                    } else if constexpr (EACH == 1) {
                        add_element<T>(sum, block[i], q + d + i, kd);
                    } else {
                        add_element<T>(sum, first_of_pair<T_>((U)block[i]), q + d + 2 * i, kd);
                        add_element<T>(sum, second_of_pair<T_>((U)block[i]), q + d + 2 * i + 1, kd);
                    }
                }
            }
            UNROLL
            for (int t = 0; t < T; t++) store(score + t * KEYS + j, sum[t]);
        }
        ahead = next;
    });
}

// c[rows, n] = (Add: c +) a[rows, pairs] . b[pairs, n], of pairs of bf16; n a multiple of 2W
template <bool Add>
void multiply_pairs(int64_t rows, const float* a, size_t lda, const float* b, size_t n, size_t pairs, float* c) {
    for (size_t d = 0; d < n; d += 2 * W)
        for (int64_t row = 0; row < rows; row += TILE)
            with_rows((int)std::min<int64_t>(TILE, rows - row), [&](auto t_) {
                constexpr int T = decltype(t_)::value;
                V left[T], right[T];
                float* to = c + row * n + d;
                UNROLL
                for (int t = 0; t < T; t++) {
                    left[t] = Add ? load(to + t * n) : V{};
                    right[t] = Add ? load(to + t * n + W) : V{};
                }
                for (size_t p = 0; p < pairs; p++) {
                    add_pair<T>(left, (U)load(b + p * n + d), a + row * lda + p, lda);
                    add_pair<T>(right, (U)load(b + p * n + d + W), a + row * lda + p, lda);
                }
                UNROLL
                for (int t = 0; t < T; t++) {
                    store(to + t * n, left[t]);
                    store(to + t * n + W, right[t]);
                }
            });
}

// 2W dimensions of the values of positions j and j + 1 as pairs; zeros for a position from n on.
INLINE void load_value_pairs(Places row, int64_t j, int64_t n, size_t d, size_t dim, U& left, U& right) {
    static const char none[sizeof(U)] = {};
    const char *first = row[j] + d * sizeof(Bf16), *second = j + 1 < n ? row[j + 1] + d * sizeof(Bf16) : none;
    U x = {}, y = {};
    if (d + 2 * W <= dim) {
        memcpy(&x, first, sizeof x);
        memcpy(&y, second, sizeof y);
    } else {
        memcpy(&x, first, (dim - d) * sizeof(Bf16));
        memcpy(&y, second, (dim - d) * sizeof(Bf16));
    }
    interleave(x, y, left, right, std::make_integer_sequence<int, 2 * W>{});
}

// values[(n + 1) / 2, width] = pairs of n rows of bf16
inline void load_values_in_pairs(Places row, Prefetch& ahead, int64_t n, size_t dim, size_t width, float* values) {
    Prefetch next = ahead;
    for (int64_t j = 0; j < n; j += 2)
        for (size_t d = 0; d < dim; d += 2 * W) {
            U left, right;
            load_value_pairs(row, j, n, d, dim, left, right);
            next.step();
            next.step();
            store(values + j / 2 * width + d, (V)left);
            store(values + j / 2 * width + d + W, (V)right);
        }
    ahead = next;
}

// Weighted values of few rows: out[rows, dim] += p[rows, n] @ n values of bf16, both as pairs; `dim` is a multiple of 2W.
inline void weigh_pairs(int64_t rows, const float* p, Places row, Prefetch& ahead, int64_t n, size_t dim, float* out,
                        size_t width) {
    with_rows((int)rows, [&](auto t_) {
        constexpr int T = decltype(t_)::value;
        Prefetch next = ahead;
        for (size_t d = 0; d + 2 * W <= dim; d += 2 * W) {
            V left[T], right[T];
            UNROLL
            for (int t = 0; t < T; t++) {
                left[t] = load(out + t * width + d);
                right[t] = load(out + t * width + d + W);
            }
            for (int64_t j = 0; j < n; j += 2) {
                U first, second;
                load_value_pairs(row, j, n, d, d + 2 * W, first, second);
                next.step();
                next.step();
                add_pair<T>(left, first, p + j / 2, KEYS);
                add_pair<T>(right, second, p + j / 2, KEYS);
            }
            UNROLL
            for (int t = 0; t < T; t++) {
                store(out + t * width + d, left[t]);
                store(out + t * width + d + W, right[t]);
            }
        }
        ahead = next;
    });
}

template <class T_>
void load_values(Places row, Prefetch& ahead, int64_t n, size_t dim, size_t width, float* values) {
    Prefetch next = ahead;
    for (int64_t j = 0; j < KEYS; j++) {
        float* to = values + j * width;
        size_t done = 0;
        if (j < n) {
            widen_row((const T_*)row[j], dim, to);
            done = padded(dim);
            for (size_t d = 0; d < dim * sizeof(T_); d += sizeof(V)) next.step();
        }
        for (; done < width; done += W) store(to + done, V{});
    }
    ahead = next;
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
// multiple of 2W.
template <class T_>
void weigh(int64_t rows, const float* score, Places row, Prefetch& ahead, int64_t n, size_t dim, float* out, size_t width) {
    for (int64_t r = 0; r < rows; r += TILE)
        with_rows((int)std::min<int64_t>(TILE, rows - r), [&](auto t_) {
            constexpr int T = decltype(t_)::value;
            Prefetch next = ahead;
            for (size_t d = 0; d < dim; d += 2 * W) {
                V sum[T][2];
                UNROLL
                for (int t = 0; t < T; t++)
                    for (int c = 0; c < 2; c++) sum[t][c] = load(out + (r + t) * width + d + c * W);
                for (int64_t j = 0; j < n; j++) {
                    V left, right;
                    load_two((const T_*)row[j] + d, left, right);
                    for (size_t b = 0; b < 2 * W * sizeof(T_); b += sizeof(V)) next.step();
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
            ahead = next;
        });
}

}  // namespace
