// How weights lie once they are packed, how rows lie that meet them, and how numbers are rounded to whole ones.
//
// A packed weight is cut into panels of COLUMNS outputs; a panel holds, lane by lane of 32 bits, the weights of its
// outputs side by side. A lane is one float, two inputs of a two-byte type, four of int8, or eight of int4, whose low
// nibbles are the first four. In int4 the lanes of GROUP inputs are followed by the group's scales.
//
// Small weights are kept unsigned, which is too high by an offset. They meet rows that were rounded to signed bytes:
// a stretch of a row that shares a step is a Head, then its bytes. What the offset adds to a sum over the stretch is
// taken off where the sum begins.
#pragma once
#include <cmath>

#include "simd.h"

namespace {

enum Kind : int64_t { F32, B16, F16, INT8, INT4, DOT };  // DOT: B16 by the CPU's own dot product of bf16 pairs
constexpr size_t COLUMNS = 2 * W;                        // outputs of a panel
constexpr size_t GROUP = 32;                             // inputs that share a scale in int4, and a step of the rows
constexpr size_t RUN = 64;                               // inputs that share a step of the rows in int8
constexpr size_t GROUP_LANES = GROUP / 8;
constexpr size_t GROUP_SCALES = GROUP_LANES * COLUMNS * 4;          // where a group's bf16 scales begin, bytes
constexpr size_t GROUP_BYTES = GROUP_SCALES + COLUMNS * 2;          // of a group in a panel
constexpr float LEAST = 1e-30f;                                     // step

struct Head {
    int32_t start;
    float step;
};

constexpr int32_t offset_of(int64_t kind) { return kind == INT8 ? 128 : 8; }
constexpr size_t shared_of(int64_t kind) { return kind == INT8 ? RUN : GROUP; }  // inputs that share a row's step
constexpr size_t inputs_of_lane(int64_t kind) { return kind == F32 ? 1 : kind == INT8 ? 4 : kind == INT4 ? 8 : 2; }
inline size_t lanes_of(int64_t kind, int64_t in) {
    size_t each = inputs_of_lane(kind), run = kind == INT8 ? RUN : each;  // int8 is filled up with what meets zeros
    return ((size_t)in + run - 1) / run * (run / each);
}
inline size_t panels_of(int64_t out) { return ((size_t)out + COLUMNS - 1) / COLUMNS; }
constexpr size_t lane_at(int64_t kind, size_t lane) {  // bytes from a panel's begin; a panel's size, given all lanes
    return kind == INT4 ? lane / GROUP_LANES * GROUP_BYTES + lane % GROUP_LANES * COLUMNS * 4 : lane * COLUMNS * 4;
}
inline int64_t packed_bytes(int64_t kind, int64_t out, int64_t in) {
    return (int64_t)(panels_of(out) * lane_at(kind, lanes_of(kind, in)));
}
inline int64_t scales_bytes(int64_t out) { return (int64_t)(panels_of(out) * COLUMNS * 4); }  // of INT8

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
// The step that lets x[n] reach from -127 to 127. Magnitudes are compared as bits, so that NaN is the largest.
template <class T> INLINE float step_of(const T* x, size_t n) {
    I peak{};
    for (size_t i = 0; i < n; i += W) {
        I v = (I)load_some(x + i, n - i) & 0x7fffffff;
        peak = v > peak ? v : peak;
    }
    float step = ((V)largest_whole(peak))[0] / 127;
    return step < LEAST ? LEAST : step;
}
// bytes[padded(n)] = x[n] in steps, rounded (int4: to what a nibble holds), + offset; returns their sum without offsets.
template <bool NIBBLES = false, class T> INLINE int32_t round_row(const T* x, size_t n, float step, int32_t offset, char* bytes) {
    float inverse = 1 / step;
    U sum{};
    for (size_t i = 0; i < n; i += W) {
        I whole = nearest(load_some(x + i, n - i) * inverse);
        if (NIBBLES) {
            whole = whole < -8 ? I{} - 8 : whole;
            whole = whole > 7 ? I{} + 7 : whole;
        }
        sum += (U)whole;
        store_bytes(bytes + i, whole + offset);
    }
    uint32_t all = 0;
    for (int j = 0; j < W; j++) all += sum[j];
    return (int32_t)all;
}

}  // namespace
