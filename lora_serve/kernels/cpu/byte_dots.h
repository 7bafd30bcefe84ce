// Dot products of quantised weights with rows of signed bytes: exact whole numbers, by the best instruction of each CPU.
//
// Without an instruction for four bytes at once, bytes are multiplied in pairs whose sums must fit 16 bits: the
// magnitudes of both factors are at most 127 (2 * 127 * 127 < 2^15), so int8's weights lose their offset first. Int4's
// are so small that the sums of a whole group fit (panels.h: 8 lanes of 2 * 15 * 127), and are widened once.
#pragma once
#include "simd.h"

namespace {

#if defined(__AVX512VNNI__) || (defined(__AVXVNNI__) && !defined(__AVX512F__))
#define UNSIGNED_BYTES  // a dot product of unsigned with signed bytes
#elif defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__)) || (defined(__SSSE3__) && !defined(__AVX2__))
#define PAIRS_OF_BYTES
#endif

#ifdef UNSIGNED_BYTES
constexpr bool SIGNED = false;  // whether int8's weights are multiplied without their offset
#else
constexpr bool SIGNED = true;
#endif

// A lane's four int8 weights as `dot_bytes` takes them.
INLINE U int8_weights(U w) { return SIGNED ? w ^ 0x80808080 : w; }

#ifdef PAIRS_OF_BYTES
typedef int16_t Pairs __attribute__((vector_size(W * 4)));

#if defined(__AVX512BW__)
INLINE U magnitudes(U w) { return (U)_mm512_abs_epi8((__m512i)w); }
INLINE U with_signs_of(U w, U x) {
    return (U)_mm512_mask_sub_epi8((__m512i)x, _mm512_movepi8_mask((__m512i)w), __m512i{}, (__m512i)x);
}
INLINE Pairs pair_products(U w, U x) { return (Pairs)_mm512_maddubs_epi16((__m512i)w, (__m512i)x); }
INLINE I pair_sums(Pairs p) { return (I)_mm512_madd_epi16((__m512i)p, (__m512i)(Pairs{} + 1)); }
#elif defined(__AVX2__)
INLINE U magnitudes(U w) { return (U)_mm256_abs_epi8((__m256i)w); }
INLINE U with_signs_of(U w, U x) { return (U)_mm256_sign_epi8((__m256i)x, (__m256i)w); }
INLINE Pairs pair_products(U w, U x) { return (Pairs)_mm256_maddubs_epi16((__m256i)w, (__m256i)x); }
INLINE I pair_sums(Pairs p) { return (I)_mm256_madd_epi16((__m256i)p, (__m256i)(Pairs{} + 1)); }
#else
INLINE U magnitudes(U w) { return (U)_mm_abs_epi8((__m128i)w); }
INLINE U with_signs_of(U w, U x) { return (U)_mm_sign_epi8((__m128i)x, (__m128i)w); }
INLINE Pairs pair_products(U w, U x) { return (Pairs)_mm_maddubs_epi16((__m128i)w, (__m128i)x); }
INLINE I pair_sums(Pairs p) { return (I)_mm_madd_epi16((__m128i)p, (__m128i)(Pairs{} + 1)); }
#endif
// Keeps the compiler from adding up first and last what is still to be computed, for which there are no registers.
INLINE I in_order(I sum) { asm("" : "+v"(sum)); return sum; }
#endif

// sum + the dot product of a lane's four weights, unsigned or SIGNED, with four signed bytes of a row
INLINE I dot_bytes(I sum, U w, U x) {
#if defined(__AVX512VNNI__)
    return (I)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
    return (I)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, (__m256i)x);
#elif defined(PAIRS_OF_BYTES)
    return in_order(sum + pair_sums(pair_products(magnitudes(w), with_signs_of(w, x))));
#elif defined(__ARM_FEATURE_DOTPROD)
    return (I)vdotq_s32((int32x4_t)sum, (int8x16_t)w, (int8x16_t)x);
#elif defined(__aarch64__)
    int8x16_t a = (int8x16_t)w, b = (int8x16_t)x;
    int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
    return (I)vpadalq_s16((int32x4_t)sum, vpaddq_s16(low, high));
#else
    for (int b = 24; b >= 0; b -= 8) sum += ((I)(w << b) >> 24) * ((I)(x << b) >> 24);
    return sum;
#endif
}

// The same over a group of int4's weights, 0 to 15: sums begin at zero, and are complete after `group_sum`.
INLINE I dot_nibbles(I sum, U w, U x) {
#ifdef PAIRS_OF_BYTES
    return in_order((I)((Pairs)sum + pair_products(w, x)));
#else
    return dot_bytes(sum, w, x);
#endif
}
INLINE I group_sum(I sum) {
#ifdef PAIRS_OF_BYTES
    return pair_sums((Pairs)sum);
#else
    return sum;
#endif
}

}  // namespace
