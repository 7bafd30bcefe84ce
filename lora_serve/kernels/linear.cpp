// Linear maps of the base: y = x Wᵀ + b, over weights that are packed once.
//
// Whatever number of rows comes, weights stream from memory once, in order. Every output is summed over the inputs in
// ascending order: a row's bits depend neither on how many rows come with it, nor on threads, nor on how the work is
// cut.
//
// A packed weight is cut into panels of COLUMNS outputs; a panel holds, lane by lane of 32 bits, the weights of its
// outputs side by side. A lane is one float, two inputs of a two-byte type, four of int8, or eight of int4, whose low
// nibbles are the first four. In int4 the lanes of GROUP inputs are followed by the group's scales.
//
// Small weights are kept unsigned, which is too high by an offset. They meet rows that were rounded to signed bytes:
// a stretch of a row that shares a step is a Head, then its bytes. What the offset adds to a sum over the stretch is
// taken off where the sum begins.
#include <algorithm>
#include <cmath>

#include "simd.h"

namespace {

// --- how weights and rows lie -----------------------------------------------------------------------------------

enum Kind : int64_t { F32, B16, F16, INT8, INT4, DOT };  // DOT: B16 by the CPU's own dot product of bf16 pairs
constexpr size_t COLUMNS = 2 * W;                        // outputs of a panel
constexpr size_t GROUP = 32;                             // inputs that share a scale in int4, and a step of the rows
constexpr size_t GROUP_LANES = GROUP / 8;
constexpr size_t GROUP_SCALES = GROUP_LANES * COLUMNS * 4;          // where a group's bf16 scales begin, bytes
constexpr size_t GROUP_BYTES = GROUP_SCALES + COLUMNS * 2;          // of a group in a panel
constexpr float LEAST = 1e-30f;                                     // step

struct Head {
    int32_t start;
    float step;
};

constexpr int32_t offset_of(int64_t kind) { return kind == INT8 ? 128 : 8; }
constexpr float most_of(int64_t kind) { return kind == INT8 ? 127 : 7; }  // largest magnitude of a weight
constexpr size_t inputs_of_lane(int64_t kind) { return kind == F32 ? 1 : kind == INT8 ? 4 : kind == INT4 ? 8 : 2; }
inline size_t lanes_of(int64_t kind, int64_t in) {
    return ((size_t)in + inputs_of_lane(kind) - 1) / inputs_of_lane(kind);
}
inline size_t panels_of(int64_t out) { return ((size_t)out + COLUMNS - 1) / COLUMNS; }
constexpr size_t lane_at(int64_t kind, size_t lane) {  // bytes from a panel's begin; a panel's size, given all lanes
    return kind == INT4 ? lane / GROUP_LANES * GROUP_BYTES + lane % GROUP_LANES * COLUMNS * 4 : lane * COLUMNS * 4;
}

// --- whole numbers ----------------------------------------------------------------------------------------------

INLINE I nearest(V v) {  // halves to the even one
#if defined(__AVX512F__)
    return (I)_mm512_cvtps_epi32((__m512)v);
#else
    I i;
    for (int j = 0; j < W; j++) i[j] = (int32_t)std::nearbyint(v[j]);
    return i;
#endif
}
INLINE V to_float(I i) {
#if defined(__AVX512F__)
    return (V)_mm512_cvtepi32_ps((__m512i)i);
#else
    return __builtin_convertvector(i, V);
#endif
}
INLINE void store_bytes(char* p, I i) {
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)i));
#else
    for (int j = 0; j < W; j++) p[j] = (char)i[j];
#endif
}

template <int D = W / 2> INLINE I largest_whole(I v) {
    I other = (I)swapped<D>((V)v, Lanes{});
    v = v > other ? v : other;
    if constexpr (D > 1) return largest_whole<D / 2>(v);
    return v;
}
// The step that lets x[n] reach from -most to most. Magnitudes are compared as bits, so that NaN is the largest.
template <class T> INLINE float step_of(const T* x, size_t n, float most) {
    I peak{};
    for (size_t i = 0; i < n; i += W) {
        I v = (I)(i + W <= n ? load(x + i) : load_part(x + i, n - i)) & 0x7fffffff;
        peak = v > peak ? v : peak;
    }
    float step = ((V)largest_whole(peak))[0] / most;
    return step < LEAST ? LEAST : step;
}
// bytes[padded(n)] = x[n] in steps, rounded, + offset; returns their sum without the offsets.
template <class T> INLINE int32_t round_row(const T* x, size_t n, float step, int32_t offset, char* bytes) {
    float inverse = 1 / step;
    U sum{};
    for (size_t i = 0; i < n; i += W) {
        I whole = nearest((i + W <= n ? load(x + i) : load_part(x + i, n - i)) * inverse);
        sum += (U)whole;
        store_bytes(bytes + i, whole + offset);
    }
    uint32_t all = 0;
    for (int j = 0; j < W; j++) all += sum[j];
    return (int32_t)all;
}

// --- rows through panels ----------------------------------------------------------------------------------------

constexpr size_t DEPTH = 1024;   // lanes for which the rows stay near while many rows pass; whole groups of int4
constexpr int64_t FEW = TILE;    // rows that pass all at once
constexpr size_t AHEAD = 2048;   // bytes of a panel that are asked for before they are needed
constexpr size_t STRETCH = sizeof(Head) + GROUP;  // bytes of a row in int4 that meet a group

struct Output {
    const char* weight;
    const float* scale;  // INT8 [panels * COLUMNS]
    const char* bias;    // of the rows' type, or null
    char* y;
    int64_t stride, out;  // stride in elements
};

struct LinearCall {  // as native_linear.py packs it
    const char* x;
    int64_t stride, rows, in, type, threads, kind, outputs;
    // then Output output[outputs]
    const Output& output(int64_t i) const { return reinterpret_cast<const Output*>(this + 1)[i]; }
};

INLINE U load_lanes(const char* p) {
    U u;
    memcpy(&u, p, sizeof u);
    return u;
}
INLINE U lane_of(const char* p) {  // in every place
    uint32_t lane;
    memcpy(&lane, p, sizeof lane);
    return U{} + lane;
}

// sum + the dot product of a lane's two bf16 numbers with two others
INLINE V dot_pair(V sum, U x, U w) {
#if defined(__AVX512BF16__)
    return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
#else
    sum += (V)(x << 16) * (V)(w << 16);
    return sum + (V)(x & 0xffff0000) * (V)(w & 0xffff0000);
#endif
}
// sum + the dot product of a lane's four unsigned bytes with four signed ones
INLINE I dot_bytes(I sum, U w, U x) {
#if defined(__AVX512VNNI__)
    return (I)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
#else
    for (int b = 0; b < 4; b++) sum += (I)((w >> (8 * b)) & 255) * ((I)(x << (24 - 8 * b)) >> 24);
    return sum;
#endif
}

INLINE void ask_for(const char* p, size_t lanes) {
    for (size_t k = 0; k < lanes * COLUMNS * 4; k += 64) __builtin_prefetch(p + AHEAD + k);
}

// sum[T, P * COLUMNS] (+)= rows x [T, from : to] (in lanes) @ the same lanes of P panels
template <int64_t K, int T, int P>
void multiply(const char* rows, size_t ld, const char* panel, size_t panel_bytes, size_t from, size_t to, float* sum,
              size_t lds, bool add) {
    using Sum = std::conditional_t<K == INT8, I, V>;
    Sum acc[T][2 * P];
    UNROLL
    for (int t = 0; t < T; t++)
        UNROLL
        for (int c = 0; c < 2 * P; c++) {
            acc[t][c] = add ? (Sum)load(sum + t * lds + c * W) : Sum{};
            if (K == INT8 && !add) acc[t][c] += (Sum)lane_of(rows + t * ld);
        }
    constexpr size_t STEP = K == INT4 ? GROUP_LANES : 1;
    for (size_t k = from; k < to; k += STEP) {
        UNROLL
        for (int p = 0; p < P; p++) {
            const char* at = panel + p * panel_bytes + lane_at(K, k);
            ask_for(at, STEP);
            UNROLL
            for (int side = 0; side < 2; side++) {
                int c = 2 * p + side;
                if constexpr (K == INT4) {
                    const char* x = rows + k / GROUP_LANES * TILE * STRETCH;
                    asm volatile("" : "+r"(x));  // else the sides share broadcasts, more of them than registers
                    I whole[T];
                    UNROLL
                    for (int t = 0; t < T; t++) whole[t] = (I)lane_of(x + t * STRETCH);
                    UNROLL
                    for (size_t i = 0; i < GROUP_LANES; i++) {
                        U w = load_lanes(at + (2 * i + side) * W * 4), low = w & 0x0f0f0f0f,
                          high = (w >> 4) & 0x0f0f0f0f;
                        const char* four = x + sizeof(Head) + i * 8;
                        UNROLL
                        for (int t = 0; t < T; t++) whole[t] = dot_bytes(whole[t], low, lane_of(four + t * STRETCH));
                        UNROLL
                        for (int t = 0; t < T; t++)
                            whole[t] = dot_bytes(whole[t], high, lane_of(four + 4 + t * STRETCH));
                    }
                    V scale = load((const Bf16*)(at + GROUP_SCALES) + side * W);
                    UNROLL
                    for (int t = 0; t < T; t++)
                        acc[t][c] += to_float(whole[t]) * (scale * ((const Head*)(x + t * STRETCH))->step);
                } else {
                    U w = load_lanes(at + side * W * 4);
                    UNROLL
                    for (int t = 0; t < T; t++) {
                        const char* row = rows + t * ld;
                        if constexpr (K == INT8) {
                            acc[t][c] = dot_bytes(acc[t][c], w, lane_of(row + sizeof(Head) + k * 4));
                        } else if constexpr (K == DOT) {
                            acc[t][c] = dot_pair(acc[t][c], lane_of(row + k * 4), w);
                        } else if constexpr (K == F32) {
                            acc[t][c] += (V)w * ((const float*)row)[k];
                        } else {
                            using Two = std::conditional_t<K == B16, Bf16, Fp16>;
                            acc[t][c] += first_of_pair<Two>(w) * ((const float*)row)[2 * k];
                            acc[t][c] += second_of_pair<Two>(w) * ((const float*)row)[2 * k + 1];
                        }
                    }
                }
            }
        }
    }
    UNROLL
    for (int t = 0; t < T; t++)
        UNROLL
        for (int c = 0; c < 2 * P; c++) store(sum + t * lds + c * W, (V)acc[t][c]);
}

template <class F> INLINE void with_kind(int64_t kind, F f) {
#define KIND(k) case k: f(std::integral_constant<int64_t, k>{}); break;
    switch (kind) { KIND(F32) KIND(B16) KIND(F16) KIND(INT8) KIND(INT4) KIND(DOT) }
#undef KIND
}

struct Span { int64_t output, from, to; };  // panels of one output

struct Work {
    const LinearCall& call;
    size_t lanes, bytes;  // of an output's weights; of a panel
    size_t ld;            // bytes of a prepared row, and room behind it for a whole vector
    const char* rows;     // prepared for the kind

    explicit Work(const LinearCall& all)
        : call(all), lanes(lanes_of(all.kind, all.in)), bytes(lane_at(all.kind, lanes)), rows(nullptr) {
        size_t size = all.kind == INT4   ? lanes / GROUP_LANES * STRETCH
                      : all.kind == INT8 ? sizeof(Head) + lanes * 4
                      : all.kind == DOT  ? lanes * 4
                                         : lanes * inputs_of_lane(all.kind) * 4;
        ld = padded(size / 4) * 4 + W * 4;
    }

    // One row as the kind wants it: floats, bf16 pairs, or stretches of bytes; zeros behind. In int4 a tile's rows lie
    // together group by group, so that a constant leads from row to row.
    void prepare(int64_t row, char* all) const {
        size_t in = (size_t)call.in;
        char* to = all + (size_t)row * ld;
        with_type(call.type, [&](auto* type) {
            using T = std::remove_pointer_t<decltype(type)>;
            const T* x = (const T*)call.x + row * call.stride;
            if (call.kind == DOT) {
                Bf16* pairs = (Bf16*)to;
                size_t i = 0;
                for (; i + W <= in; i += W) store(pairs + i, load(x + i));
                if (i < in) store_part(pairs + i, load_part(x + i, in - i), in - i);
                if (in % 2) pairs[in] = Bf16{0};
            } else if (call.kind == INT8) {
                stretch(x, in, to);
            } else if (call.kind == INT4) {
                to = all + (size_t)(row / TILE * TILE) * ld + (size_t)(row % TILE) * STRETCH;
                for (size_t i = 0; i < in; i += GROUP, to += TILE * STRETCH) stretch(x + i, GROUP, to);
            } else {
                widen_row(x, in, (float*)to);
            }
        });
    }
    template <class T> void stretch(const T* x, size_t n, char* to) const {
        Head head{0, step_of(x, n, 127)};
        head.start = -offset_of(call.kind) * round_row(x, n, head.step, 0, to + sizeof head);
        memcpy(to, &head, sizeof head);
    }

    // y[first : first + rows, columns of one panel] from sums
    void finish(const Output& o, int64_t panel, int64_t first, int64_t count, const float* sum, size_t lds) const {
        int64_t column = panel * (int64_t)COLUMNS, n = std::min<int64_t>(COLUMNS, o.out - column);
        with_type(call.type, [&](auto* type) {
            using T = std::remove_pointer_t<decltype(type)>;
            const T* bias = o.bias ? (const T*)o.bias + column : nullptr;
            for (int64_t t = 0; t < count; t++) {
                T* y = (T*)o.y + (first + t) * o.stride + column;
                float step = call.kind == INT8 ? ((const Head*)(rows + (first + t) * ld))->step : 1;
                for (int64_t c = 0; c < n; c += W) {
                    int64_t m = std::min<int64_t>(W, n - c);
                    V v = load(sum + t * lds + c);
                    if (call.kind == INT8) v = to_float((I)v) * (load(o.scale + column + c) * step);
                    if (bias) v += m == W ? load(bias + c) : load_part(bias + c, m);
                    if (m == W) store(y + c, v);
                    else store_part(y + c, v, m);
                }
            }
        });
    }

    // All rows at once, as many panels together as there are registers for.
    void few(const Span& span) const {
        const Output& o = call.output(span.output);
        float sum[FEW * 8 * W];
        with_kind(call.kind, [&](auto kind) {
            constexpr int64_t K = decltype(kind)::value;
            with_rows((int)call.rows, [&](auto t) {
                constexpr int T = decltype(t)::value, P = T <= 2 ? 4 : T <= 4 ? 2 : 1;
                int64_t panel = span.from;
                for (; panel + P <= span.to; panel += P) {
                    multiply<K, T, P>(rows, ld, o.weight + panel * bytes, bytes, 0, lanes, sum, P * COLUMNS, false);
                    for (int p = 0; p < P; p++) finish(o, panel + p, 0, T, sum + p * COLUMNS, P * COLUMNS);
                }
                for (; panel < span.to; panel++) {
                    multiply<K, T, 1>(rows, ld, o.weight + panel * bytes, bytes, 0, lanes, sum, COLUMNS, false);
                    finish(o, panel, 0, T, sum, COLUMNS);
                }
            });
        });
    }

    // Tiles of rows, one stretch of inputs after the other; sums has room for the span's panels of all rows.
    void many(const Span& span, float* sums) const {
        const Output& o = call.output(span.output);
        size_t all = (size_t)call.rows;
        bool once = lanes <= DEPTH;
        for (size_t k = 0; k < lanes; k += DEPTH) {
            size_t to = std::min(lanes, k + DEPTH);
            for (int64_t panel = span.from; panel < span.to; panel++) {
                float* sum = once ? sums : sums + (size_t)(panel - span.from) * all * COLUMNS;
                with_kind(call.kind, [&](auto kind) {
                    for (size_t row = 0; row < all; row += TILE)
                        with_rows((int)std::min<size_t>(TILE, all - row), [&](auto t) {
                            multiply<decltype(kind)::value, decltype(t)::value, 1>(
                                rows + row * ld, ld, o.weight + panel * bytes, bytes, k, to, sum + row * COLUMNS,
                                COLUMNS, k > 0);
                        });
                });
                if (to == lanes) finish(o, panel, 0, call.rows, sum, COLUMNS);
            }
        }
    }
};

}  // namespace

extern "C" int64_t lora_columns() { return (int64_t)COLUMNS; }

// Whether this CPU multiplies pairs of bf16 by itself.
extern "C" int64_t lora_has_dot() {
#if defined(__AVX512BF16__)
    return 1;
#else
    return 0;
#endif
}

extern "C" int64_t lora_linear(const LinearCall* call) {
    static thread_local std::vector<float> shared;
    int64_t all = 0;
    for (int64_t i = 0; i < call->outputs; i++) all += (int64_t)panels_of(call->output(i).out);
    if (all == 0 || call->rows == 0) return 0;
    Work work(*call);
    size_t count = (size_t)call->rows, prepared = (count + TILE - 1) / TILE * TILE * work.ld / 4;
    bool own = call->rows <= FEW;  // every thread prepares few rows for itself, which saves waiting for each other
    float* common = own ? nullptr : scratch(shared, prepared);
    constexpr int64_t SMALL = 1 << 17;  // products; with fewer, one thread is done before another is awake
    int wanted = all * (int64_t)COLUMNS * call->in * call->rows < SMALL ? 1 : (int)call->threads;
    parallel(wanted, [&](int thread, int threads) {
        static thread_local std::vector<float> mine;
        size_t sums = count * COLUMNS * (work.lanes <= DEPTH ? 1 : (size_t)((all + threads - 1) / threads) + 1);
        float* room = scratch(mine, own ? prepared : sums);
        char* rows = (char*)(own ? room : common);
        Work part = work;
        part.rows = rows;
        size_t from = own ? 0 : count * thread / threads, until = own ? count : count * (thread + 1) / threads;
        for (size_t row = from; row < until; row++) part.prepare((int64_t)row, rows);
        if (!own && threads > 1) barrier();
        int64_t lo = all * thread / threads, hi = all * (thread + 1) / threads, at = 0;
        for (int64_t i = 0; i < call->outputs; i++) {
            int64_t n = (int64_t)panels_of(call->output(i).out);
            Span span{i, std::max<int64_t>(0, lo - at), std::min(n, hi - at)};
            at += n;
            if (span.from >= span.to) continue;
            if (own) part.few(span);
            else part.many(span, room);
        }
    });
    return 0;
}

// --- packing ----------------------------------------------------------------------------------------------------
//
// W outputs at a time: each one's weights become a row of lanes, and the rows are turned into one side of a panel.

namespace {

struct PackCall {  // as native_linear.py packs it
    char* weight;  // [out, in] contiguous; what is unpacked from INT8 and INT4 is float32
    int64_t out, in, type, kind;  // type: of the weights that are packed
    char* packed;
    float* scale;  // INT8 [panels * COLUMNS]
    int64_t threads;
};

struct Packing {
    const PackCall& call;
    size_t in, lanes, ld;  // of a row: inputs, lanes, floats from row to row

    explicit Packing(const PackCall& all)
        : call(all), in((size_t)all.in), lanes(lanes_of(all.kind, all.in)), ld(padded(lanes) + W) {}

    // Rows of lanes [W, lanes] into one side of a panel.
    void turn(const float* rows, char* side) const {
        for (size_t k = 0; k < lanes; k += W) {
            V block[W];
            for (size_t i = 0; i < W; i++) block[i] = load(rows + i * ld + k);
            transpose(block);
            for (size_t i = 0; i < W && k + i < lanes; i++) store((float*)(side + lane_at(call.kind, k + i)), block[i]);
        }
    }
    void turn_back(const char* side, float* rows) const {
        for (size_t k = 0; k < lanes; k += W) {
            V block[W] = {};
            for (size_t i = 0; i < W && k + i < lanes; i++)
                block[i] = load((const float*)(side + lane_at(call.kind, k + i)));
            transpose(block);
            for (size_t i = 0; i < W; i++) store(rows + i * ld + k, block[i]);
        }
    }

    // An output's weights as lanes; its scales go where they stay, in int4 from the first group's on.
    template <class T> void shrink(const T* x, char* to, float* scale, char* group_scale) const {
        if (call.kind == INT8) {
            *scale = step_of(x, in, most_of(INT8));
            round_row(x, in, *scale, offset_of(INT8), to);
        } else if (call.kind == INT4) {
            char bytes[GROUP];
            for (size_t i = 0; i < in; i += GROUP, group_scale += GROUP_BYTES) {
                Bf16* kept = (Bf16*)group_scale;
                store_part(kept, V{} + step_of(x + i, GROUP, most_of(INT4)), 1);
                round_row(x + i, GROUP, load_part(kept, 1)[0], offset_of(INT4), bytes);
                for (size_t b = 0; b < GROUP; b += 8, to += 4) {
                    uint32_t low, high;
                    memcpy(&low, bytes + b, 4);
                    memcpy(&high, bytes + b + 4, 4);
                    low |= high << 4;
                    memcpy(to, &low, 4);
                }
            }
        } else {
            memcpy(to, x, in * sizeof(T));
        }
    }
    // The inverse for kinds that are small.
    void widen(float* x, const uint8_t* from, const float* scale, const char* group_scale) const {
        if (call.kind == INT8) {
            for (size_t i = 0; i < in; i++) x[i] = (float)(from[i] - offset_of(INT8)) * *scale;
            return;
        }
        for (size_t i = 0; i < in; i += GROUP, group_scale += GROUP_BYTES) {
            float step = load_part((const Bf16*)group_scale, 1)[0];
            for (size_t b = 0; b < GROUP; b += 8, from += 4)
                for (size_t j = 0; j < 8; j++)
                    x[i + b + j] = (float)((from[j % 4] >> (j & 4) & 15) - offset_of(INT4)) * step;
        }
    }

    // body(side, its rows, its place in a panel, first output, outputs) for all sides, shared among the threads
    template <class F> void each_side(F body) const {
        int64_t sides = 2 * (int64_t)panels_of(call.out);
        parallel((int)call.threads, [&](int thread, int threads) {
            static thread_local std::vector<float> memory;
            float* rows = scratch(memory, W * ld);
            for (int64_t s = sides * thread / threads; s < sides * (thread + 1) / threads; s++) {
                char* side = call.packed + s / 2 * (int64_t)lane_at(call.kind, lanes) + s % 2 * W * 4;
                char* group_scales = side + GROUP_SCALES - s % 2 * W * 2;
                body(side, group_scales, rows, s * W, std::clamp<int64_t>(call.out - s * W, 0, W));
            }
        });
    }
    void pack() const {
        each_side([&](char* side, char* group_scales, float* rows, int64_t first, int64_t count) {
            std::fill(rows, rows + W * ld, 0.0f);
            if (call.kind == INT4 && count < W)
                for (size_t k = 0; k < lanes; k += GROUP_LANES) memset(group_scales + lane_at(INT4, k), 0, W * 2);
            with_type(call.type, [&](auto* type) {
                using T = std::remove_pointer_t<decltype(type)>;
                for (int64_t i = 0; i < count; i++)
                    shrink((const T*)call.weight + (first + i) * call.in, (char*)(rows + i * ld),
                           call.scale + first + i, group_scales + 2 * i);
            });
            turn(rows, side);
        });
    }
    void unpack() const {
        bool small = call.kind == INT8 || call.kind == INT4;
        size_t size = in * (small || call.type == FP32 ? 4 : 2);
        each_side([&](char* side, char* group_scales, float* rows, int64_t first, int64_t count) {
            turn_back(side, rows);
            for (int64_t i = 0; i < count; i++) {
                char* x = call.weight + (size_t)(first + i) * size;
                const float* row = rows + i * ld;
                if (small) widen((float*)x, (const uint8_t*)row, call.scale + first + i, group_scales + 2 * i);
                else memcpy(x, row, size);
            }
        });
    }
};

}  // namespace

// Lays a weight [out, in] out in panels.
extern "C" int64_t lora_pack(const PackCall* call) {
    Packing(*call).pack();
    return 0;
}

// The inverse: weights as they were, or what small ones stand for.
extern "C" int64_t lora_unpack(const PackCall* call) {
    Packing(*call).unpack();
    return 0;
}
