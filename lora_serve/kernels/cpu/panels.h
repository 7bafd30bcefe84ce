// The layout of packed weights, the layout of the rows that they are multiplied with, and rounding to integers.
//
// A weight [out, in] is cut into panels: a panel holds the weights of COLUMNS consecutive outputs (two vectors, its two
// sides). Consecutive inputs of one output that fill 32 bits are a lane: one float, two inputs of a two-byte type, four
// of int8, or eight of int4, whose low nibbles are the first four. A panel is an array [lanes][COLUMNS] of them, so
// that one vector load gives W outputs the same inputs. In int4 the lanes of GROUP inputs are followed by the group's
// levels (packed_weight.py), two bytes for each output.
//
// Quantised weights are stored unsigned, in int8 with 128 added. They are multiplied with rows rounded to signed bytes: a
// group of inputs that share a step is stored as a Head and then its bytes. What int8's 128 and int4's zero points add to
// a sum over the group is taken from it with the help of the head.
#pragma once
#include <cmath>

#include "simd.h"

namespace {

enum Kind : int64_t { F32, B16, F16, INT8, INT4, DOT };  // DOT: B16, multiplied by the dot product of bf16 pairs
constexpr size_t COLUMNS = 2 * W;                        // outputs of a panel
constexpr size_t GROUP = 32;                             // inputs that share a level in int4, and a step of its rows
constexpr size_t RUN = 64;                               // inputs that share a step of int8's rows
constexpr size_t GROUP_LANES = GROUP / 8;
constexpr size_t GROUP_LEVELS = GROUP_LANES * COLUMNS * 4;          // offset of a group's levels, bytes
constexpr size_t GROUP_BYTES = GROUP_LEVELS + COLUMNS * 2;          // a group in a panel, with its levels
constexpr float LEAST = 1e-30f;                                     // smallest step

struct Head {
    union {
        int32_t start;  // INT8: -128 times the sum of the group's bytes
        float eighth;   // INT4: an eighth of what the group's numbers, rounded, sum up to
    };
    float step;
};

constexpr int32_t OFFSET = 128;  // of INT8
constexpr size_t shared_of(int64_t kind) { return kind == INT8 ? RUN : GROUP; }  // inputs that share a row's step
constexpr size_t inputs_of_lane(int64_t kind) { return kind == F32 ? 1 : kind == INT8 ? 4 : kind == INT4 ? 8 : 2; }
inline size_t lanes_of(int64_t kind, int64_t in) {
    size_t each = inputs_of_lane(kind), run = kind == INT8 ? RUN : each;  // int8 is padded to whole groups
    return ((size_t)in + run - 1) / run * (run / each);
}
inline size_t panels_of(int64_t out) { return ((size_t)out + COLUMNS - 1) / COLUMNS; }
constexpr size_t lane_at(int64_t kind, size_t lane) {  // offset in a panel, bytes; given all lanes, the panel's size
    return kind == INT4 ? lane / GROUP_LANES * GROUP_BYTES + lane % GROUP_LANES * COLUMNS * 4 : lane * COLUMNS * 4;
}
inline int64_t packed_bytes(int64_t kind, int64_t out, int64_t in) {
    return (int64_t)(panels_of(out) * lane_at(kind, lanes_of(kind, in)));
}
inline int64_t scales_bytes(int64_t out) { return (int64_t)(panels_of(out) * COLUMNS * 4); }  // of INT8 and INT4

// --- integers ---------------------------------------------------------------------------------------------------

INLINE I nearest(V v) {  // halves to even
#if defined(__AVX512F__)
    return (I)_mm512_cvtps_epi32((__m512)v);
#elif defined(__AVX2__)
    return (I)_mm256_cvtps_epi32((__m256)v);
#elif defined(__aarch64__)
    return (I)vcvtnq_s32_f32((float32x4_t)v);
#elif defined(__x86_64__)
    return (I)_mm_cvtps_epi32((__m128)v);
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
// s and z of int4's levels, as floats
INLINE V scale_of_levels(U level) { return (V)(((level & 0xff80) << 11) + (112u << 23)); }
INLINE V zero_of_levels(U level) { return to_float((I)(level & 0x7f)); }
INLINE void store_bytes(char* p, I i) {
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)i));
#else
    H h = narrowed((U)i & 255);
#if defined(__AVX2__)
    h = (H)_mm_packus_epi16((__m128i)h, (__m128i)h);
#elif defined(__aarch64__)
    uint16x4_t half = (uint16x4_t)h;
    h = (H)vreinterpret_u16_u8(vmovn_u16(vcombine_u16(half, half)));
#else
    char bytes[W];
    for (int j = 0; j < W; j++) bytes[j] = (char)h[j];
    memcpy(&h, bytes, W);
#endif
    memcpy(p, &h, W);
#endif
}

template <int D = W / 2> INLINE I largest_whole(I v) {
    I other = (I)swapped<D>((V)v, Lanes{});
    v = v > other ? v : other;
    if constexpr (D > 1) return largest_whole<D / 2>(v);
    return v;
}
// The step with which x[n] in steps spans -127 to 127. Magnitudes are compared as bits, so that NaN is the largest.
template <class T> INLINE float step_of(const T* x, size_t n) {
    I peak{};
    for (size_t i = 0; i < n; i += W) {
        I v = (I)load_some(x + i, n - i) & 0x7fffffff;
        peak = v > peak ? v : peak;
    }
    float step = ((V)largest_whole(peak))[0] / 127;
    return step < LEAST ? LEAST : step;
}
// bytes[padded(n)] = round(x[n] / step) + offset; returns the sum without offsets.
template <class T> INLINE int32_t round_row(const T* x, size_t n, float step, int32_t offset, char* bytes) {
    float inverse = 1 / step;
    U sum{};
    for (size_t i = 0; i < n; i += W) {
        I whole = nearest(load_some(x + i, n - i) * inverse);
        sum += (U)whole;
        store_bytes(bytes + i, whole + offset);
    }
    uint32_t all = 0;
    for (int j = 0; j < W; j++) all += sum[j];
    return (int32_t)all;
}

}  // namespace
