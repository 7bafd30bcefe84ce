// Linear maps of the base: y = x Wᵀ + b, over weights that were packed once.
//
// A packed weight is cut into panels of 2W outputs; a panel holds, input by input, the weights of its outputs side by
// side. So whatever number of rows comes, weights stream from memory once, in order. Every output is summed over the
// inputs in ascending order: a row's bits depend neither on how many rows come with it, nor on threads, nor on how the
// work is cut.
//
// Lanes are 32 bits: one float, two inputs of a two-byte type, four of int8 (which meet the rows rounded to int8 each
// with a scale of its own), eight of int4 (two bytes of it are four inputs; a scale for every GROUP inputs).
#include <algorithm>
#include <cmath>

#include "simd.h"

namespace {

enum Kind : int64_t { F32, B16, F16, INT8, INT4, DOT };  // DOT: B16 by the CPU's own dot product of bf16 pairs
constexpr size_t COLUMNS = 2 * W;                        // outputs of a panel
constexpr size_t GROUP = 32;                             // inputs that share a scale in int4
constexpr size_t DEPTH = 1024;                           // inputs for which the rows stay near while many rows pass
constexpr int64_t FEW = 8;                               // rows that pass all at once

struct Output {
    const char* weight;
    const float* scale;  // INT8 [panels, COLUMNS], then int32 sums of outputs' weights; INT4 [panels, groups, COLUMNS]
    const char* bias;    // of the rows' type, or null
    char* y;
    int64_t stride, out;  // stride in elements
};

struct LinearCall {  // as native.py packs it
    const char* x;
    int64_t stride, rows, in, type, threads, kind, outputs;
    // then Output output[outputs]
    const Output& output(int64_t i) const { return reinterpret_cast<const Output*>(this + 1)[i]; }
};

struct PackCall {  // as native.py packs it
    char* weight;  // [out, in] contiguous: of a float type, or int8 numbers for INT8 and INT4
    int64_t out, in, kind;
    char* packed;
};

constexpr size_t inputs_of_lane(int64_t kind) {  // inputs that one 32-bit lane holds
    return kind == F32 ? 1 : kind == INT8 ? 4 : kind == INT4 ? 8 : 2;
}
size_t lanes_of(int64_t kind, int64_t in) { return ((size_t)in + inputs_of_lane(kind) - 1) / inputs_of_lane(kind); }

INLINE U load_lanes(const char* p) {
    U u;
    memcpy(&u, p, sizeof u);
    return u;
}
INLINE U same(uint32_t lane) { return U{} + lane; }
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
INLINE I dot_bytes(I sum, U x, U w) {
#if defined(__AVX512VNNI__)
    return (I)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
#else
    for (int b = 0; b < 4; b++) sum += (I)((x >> (8 * b)) & 255) * ((I)(w << (24 - 8 * b)) >> 24);
    return sum;
#endif
}

// sum[T, P * COLUMNS] (+)= rows x [T, from : to] (in lanes) @ the same lanes of P panels
template <int64_t K, int T, int P>
void multiply(const char* rows, size_t ld, const char* panel, size_t panel_bytes, const float* scale, size_t scales,
              size_t from, size_t to, float* sum, size_t lds, bool add) {
    using Sum = std::conditional_t<K == INT8, I, V>;
    Sum acc[T][2 * P];
    UNROLL
    for (int t = 0; t < T; t++)
        UNROLL
        for (int c = 0; c < 2 * P; c++) acc[t][c] = add ? (Sum)load(sum + t * lds + c * W) : Sum{};
    for (size_t k = from; k < to; k++) {
        UNROLL
        for (int p = 0; p < P; p++) {
            const char* at = panel + p * panel_bytes + k * COLUMNS * 4;
            __builtin_prefetch(at + 1024);
            if (W == 16) __builtin_prefetch(at + 1024 + 64);
            UNROLL
            for (int side = 0; side < 2; side++) {
                U w = load_lanes(at + side * W * 4);
                if constexpr (K == INT8) {
                    UNROLL
                    for (int t = 0; t < T; t++) {
                        uint32_t lane;
                        memcpy(&lane, rows + t * ld + k * 4, 4);
                        acc[t][2 * p + side] = dot_bytes(acc[t][2 * p + side], same(lane), w);
                    }
                } else if constexpr (K == DOT) {
                    UNROLL
                    for (int t = 0; t < T; t++) {
                        uint32_t lane;
                        memcpy(&lane, rows + t * ld + k * 4, 4);
                        acc[t][2 * p + side] = dot_pair(acc[t][2 * p + side], same(lane), w);
                    }
                } else if constexpr (K == INT4) {
                    V factor = load(scale + p * scales + k / (GROUP / 8) * COLUMNS + side * W);
                    UNROLL
                    for (int i = 0; i < 8; i++) {
                        V v = to_float((I)((w >> (4 * i)) & 15) - 8) * factor;
                        UNROLL
                        for (int t = 0; t < T; t++)
                            acc[t][2 * p + side] += v * ((const float*)(rows + t * ld))[8 * k + i];
                    }
                } else if constexpr (K == F32) {
                    UNROLL
                    for (int t = 0; t < T; t++) acc[t][2 * p + side] += (V)w * ((const float*)(rows + t * ld))[k];
                } else {
                    using Two = std::conditional_t<K == B16, Bf16, Fp16>;
                    V first = first_of_pair<Two>(w), second = second_of_pair<Two>(w);
                    UNROLL
                    for (int t = 0; t < T; t++) {
                        const float* x = (const float*)(rows + t * ld) + 2 * k;
                        acc[t][2 * p + side] += first * x[0];
                        acc[t][2 * p + side] += second * x[1];
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
    size_t lanes, ld;      // of a row: 32-bit lanes, bytes
    const char* rows;      // prepared for the kind
    const float* factors;  // INT8: each row's scale

    static int64_t panels(const Output& o) { return (o.out + (int64_t)COLUMNS - 1) / (int64_t)COLUMNS; }
    size_t panel_bytes() const { return lanes * COLUMNS * 4; }
    size_t scales() const { return ((size_t)call.in + GROUP - 1) / GROUP * COLUMNS; }
    const float* scale(const Output& o, int64_t panel) const {
        return call.kind == INT4 ? o.scale + panel * scales() : nullptr;
    }

    // One row as the kind wants it: floats, bf16 pairs, or bytes and their scale; zeros behind.
    void prepare(int64_t row, char* to, float* factor) const {
        size_t in = (size_t)call.in;
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
                V most{};
                for (size_t i = 0; i < in; i += W) {
                    V v = i + W <= in ? load(x + i) : load_part(x + i, in - i);
                    most = larger(most, (V)((U)v & 0x7fffffff));
                }
                float peak = largest(most);
                *factor = peak / 127;
                float inverse = peak > 0 ? 127 / peak : 0;
                for (size_t i = 0; i < in; i += W) {
                    I whole = nearest((i + W <= in ? load(x + i) : load_part(x + i, in - i)) * inverse) + 128;
                    for (size_t j = 0; j < W && i + j < lanes * 4; j++) to[i + j] = (char)whole[j];
                }
            } else {
                widen_row(x, in, (float*)to);
            }
        });
    }

    // y[first : first + rows, columns of one panel] from sums
    void finish(const Output& o, int64_t panel, int64_t first, int64_t count, const float* sum, size_t lds) const {
        int64_t column = panel * COLUMNS, n = std::min<int64_t>(COLUMNS, o.out - column);
        const int32_t* totals = (const int32_t*)(o.scale + panels(o) * COLUMNS) + column;  // INT8
        with_type(call.type, [&](auto* type) {
            using T = std::remove_pointer_t<decltype(type)>;
            const T* bias = o.bias ? (const T*)o.bias + column : nullptr;
            for (int64_t t = 0; t < count; t++) {
                T* y = (T*)o.y + (first + t) * o.stride + column;
                for (int64_t c = 0; c < n; c += W) {
                    int64_t m = std::min<int64_t>(W, n - c);
                    V v = load(sum + t * lds + c);
                    if (call.kind == INT8) {  // the rows' bytes stand 128 too high
                        I high;
                        memcpy(&high, totals + c, sizeof high);
                        v = to_float((I)v - 128 * high) * (load(o.scale + column + c) * factors[first + t]);
                    }
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
        size_t bytes = panel_bytes();
        float sum[FEW * 8 * W];
        with_kind(call.kind, [&](auto kind) {
            constexpr int64_t K = decltype(kind)::value;
            with_rows((int)call.rows, [&](auto t) {
                constexpr int T = decltype(t)::value, P = T <= 2 ? 4 : T <= 4 ? 2 : 1;
                int64_t panel = span.from;
                for (; panel + P <= span.to; panel += P) {
                    multiply<K, T, P>(rows, ld, o.weight + panel * bytes, bytes, scale(o, panel), scales(), 0, lanes,
                                      sum, P * COLUMNS, false);
                    for (int p = 0; p < P; p++) finish(o, panel + p, 0, T, sum + p * COLUMNS, P * COLUMNS);
                }
                for (; panel < span.to; panel++) {
                    multiply<K, T, 1>(rows, ld, o.weight + panel * bytes, bytes, scale(o, panel), 0, 0, lanes, sum,
                                      COLUMNS, false);
                    finish(o, panel, 0, T, sum, COLUMNS);
                }
            });
        });
    }

    // Tiles of rows, one stretch of inputs after the other; sums has room for the span's panels of all rows.
    void many(const Span& span, float* sums) const {
        const Output& o = call.output(span.output);
        size_t bytes = panel_bytes(), all = (size_t)call.rows;
        bool once = lanes <= DEPTH;
        for (size_t k = 0; k < lanes; k += DEPTH) {
            size_t to = std::min(lanes, k + DEPTH);
            for (int64_t panel = span.from; panel < span.to; panel++) {
                float* sum = once ? sums : sums + (size_t)(panel - span.from) * all * COLUMNS;
                with_kind(call.kind, [&](auto kind) {
                    for (size_t row = 0; row < all; row += TILE)
                        with_rows((int)std::min<size_t>(TILE, all - row), [&](auto t) {
                            multiply<decltype(kind)::value, decltype(t)::value, 1>(
                                rows + row * ld, ld, o.weight + panel * bytes, bytes, scale(o, panel), 0, k, to,
                                sum + row * COLUMNS, COLUMNS, k > 0);
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
    for (int64_t i = 0; i < call->outputs; i++) all += Work::panels(call->output(i));
    if (all == 0 || call->rows == 0) return 0;
    size_t count = (size_t)call->rows, lanes = lanes_of(call->kind, call->in);
    size_t width = call->kind == DOT || call->kind == INT8 ? lanes : lanes * inputs_of_lane(call->kind);
    size_t row_floats = padded(width) + W, prepared = count * (row_floats + 1);  // and each row's scale
    Work work{*call, lanes, row_floats * 4, nullptr, nullptr};
    bool own = call->rows <= FEW;  // every thread prepares few rows for itself, which saves waiting for each other
    float* common = own ? nullptr : scratch(shared, prepared);
    constexpr int64_t SMALL = 1 << 17;  // products; with fewer, one thread is done before another is awake
    int wanted = all * (int64_t)COLUMNS * call->in * call->rows < SMALL ? 1 : (int)call->threads;
    parallel(wanted, [&](int thread, int threads) {
        static thread_local std::vector<float> mine;
        size_t sums = count * COLUMNS * (lanes <= DEPTH ? 1 : (size_t)((all + threads - 1) / threads) + 1);
        float* room = scratch(mine, own ? prepared : sums);
        float* place = own ? room : common;
        Work part = work;
        part.rows = (const char*)(place + count);
        part.factors = place;
        size_t from = own ? 0 : count * thread / threads, until = own ? count : count * (thread + 1) / threads;
        for (size_t row = from; row < until; row++)
            part.prepare((int64_t)row, (char*)(place + count + row * row_floats), place + row);
        if (!own && threads > 1) barrier();
        int64_t lo = all * thread / threads, hi = all * (thread + 1) / threads, at = 0;
        for (int64_t i = 0; i < call->outputs; i++) {
            int64_t n = Work::panels(call->output(i));
            Span span{i, std::max<int64_t>(0, lo - at), std::min(n, hi - at)};
            at += n;
            if (span.from >= span.to) continue;
            if (own) part.few(span);
            else part.many(span, room);
        }
    });
    return 0;
}

namespace {

// f(a lane of the packed weight, output, its first input) for every lane
template <class F> void each_lane(const PackCall& call, F f) {
    size_t panels = ((size_t)call.out + COLUMNS - 1) / COLUMNS, lanes = lanes_of(call.kind, call.in);
#pragma omp parallel for
    for (size_t panel = 0; panel < panels; panel++) {
        uint32_t* lane = (uint32_t*)call.packed + panel * lanes * COLUMNS;
        for (size_t k = 0; k < lanes; k++)
            for (size_t c = 0; c < COLUMNS; c++, lane++)
                f(lane, (int64_t)(panel * COLUMNS + c), (int64_t)(k * inputs_of_lane(call.kind)));
    }
}

size_t bytes_of_number(int64_t kind) { return kind == F32 ? 4 : kind == INT8 || kind == INT4 ? 1 : 2; }

}  // namespace

// Lays a weight [out, in] out in panels; what there is no weight for becomes zero.
extern "C" int64_t lora_pack(const PackCall* call) {
    int64_t each = (int64_t)inputs_of_lane(call->kind), size = (int64_t)bytes_of_number(call->kind);
    each_lane(*call, [&](uint32_t* lane, int64_t o, int64_t first) {
        uint32_t value = call->kind == INT4 ? 0x88888888u : 0;
        int64_t there = o < call->out ? std::min(each, call->in - first) : 0;
        const char* from = call->weight + (o * call->in + first) * size;
        if (call->kind == INT4)
            for (int64_t i = 0; i < there; i++) value = (value & ~(15u << (4 * i))) | (uint32_t)(from[i] + 8) << (4 * i);
        else if (there > 0)
            memcpy(&value, from, (size_t)(there * size));
        *lane = value;
    });
    return 0;
}

// The inverse: float weights, or int8 numbers, [out, in].
extern "C" int64_t lora_unpack(const PackCall* call) {
    int64_t each = (int64_t)inputs_of_lane(call->kind), size = (int64_t)bytes_of_number(call->kind);
    each_lane(*call, [&](uint32_t* lane, int64_t o, int64_t first) {
        if (o >= call->out) return;
        char* to = call->weight + (o * call->in + first) * size;
        int64_t there = std::min(each, call->in - first);
        if (call->kind == INT4)
            for (int64_t i = 0; i < there; i++) to[i] = (char)((int)((*lane >> (4 * i)) & 15) - 8);
        else
            memcpy(to, lane, (size_t)(there * size));
    });
    return 0;
}
