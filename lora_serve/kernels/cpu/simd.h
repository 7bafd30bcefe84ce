// Portable vectors of floats, and the operations on them that the kernels share.
//
// GCC's vector extension (clang has it too) instead of intrinsics: one source for AVX-512, AVX2 and NEON. Intrinsics
// are used only where the extension cannot express an instruction that matters.
//
// A row's result never depends on its neighbours: whatever number of rows a micro-kernel takes, each row gets the same
// operations in the same order. So a sequence gives the same bits alone, in a batch, or cut into chunks.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef LORA_CHECKED
#include <sanitizer/asan_interface.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

namespace {

// W: floats in a vector. A wider one than the CPU's would be taken apart by the compiler, often lane by lane.
#if defined(__AVX512F__)
constexpr int W = 16, REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int W = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int W = 4, REGISTERS = 32;
#else
constexpr int W = 4, REGISTERS = 16;
#endif
constexpr int TILE = W == 16 ? 8 : 4;  // most rows of a micro-kernel: TILE x 2 sums fill at most half the registers

typedef float V __attribute__((vector_size(W * 4)));
typedef uint32_t U __attribute__((vector_size(W * 4)));
typedef int32_t I __attribute__((vector_size(W * 4)));
typedef uint16_t H __attribute__((vector_size(W * 2)));

struct Bf16 { uint16_t bits; };
struct Fp16 { uint16_t bits; };
enum Type : int64_t { FP32, BF16, FP16 };

constexpr int64_t bytes_of(int64_t type) { return type == FP32 ? 4 : 2; }
constexpr size_t padded(size_t n) { return (n + W - 1) / W * W; }

// --- load widens to float, store rounds to nearest even ---------------------------------------------------------

INLINE V load(const float* p) { V v; memcpy(&v, p, sizeof v); return v; }
INLINE void store(float* p, V v) { memcpy(p, &v, sizeof v); }

// GCC widens and narrows whole vectors in halves, at twice the cost, so intrinsics are used where it matters.
INLINE U widened(H h) {
#if defined(__AVX512F__)
    return (U)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__)
    return (U)_mm256_cvtepu16_epi32((__m128i)h);
#elif defined(__aarch64__)
    return (U)vmovl_u16((uint16x4_t)h);
#else
    return __builtin_convertvector(h, U);
#endif
}
INLINE H narrowed(U u) {  // the lower halves
#if defined(__AVX512F__)
    return (H)_mm512_cvtepi32_epi16((__m512i)u);
#elif defined(__AVX2__)
    __m256i low = (__m256i)(u & 0xffff);
    return (H)_mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
#elif defined(__aarch64__)
    return (H)vmovn_u32((uint32x4_t)u);
#else
    return __builtin_convertvector(u, H);
#endif
}

INLINE V load(const Bf16* p) {
    H h;
    memcpy(&h, p, sizeof h);
    return (V)(widened(h) << 16);
}

INLINE void store(Bf16* p, V v) {
#if defined(__AVX512BF16__)
    auto h = _mm512_cvtneps_pbh((__m512)v);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    auto h = vcvt_bf16_f32((float32x4_t)v);
#else
    U u = (U)v;
    U rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    I number = v == v;  // all ones, or zero for NaN, which must not round into infinity
    H h = narrowed((rounded & (U)number) | (((u >> 16) | 0x40) & ~(U)number));
#endif
    memcpy(p, &h, W * 2);
}

#if defined(__AVX512F__)
INLINE V load(const Fp16* p) { __m256i h; memcpy(&h, p, sizeof h); return (V)_mm512_cvtph_ps(h); }
INLINE void store(Fp16* p, V v) { __m256i h = _mm512_cvtps_ph((__m512)v, 0); memcpy(p, &h, sizeof h); }
#elif defined(__F16C__) && defined(__AVX2__)
INLINE V load(const Fp16* p) { __m128i h; memcpy(&h, p, sizeof h); return (V)_mm256_cvtph_ps(h); }
INLINE void store(Fp16* p, V v) { __m128i h = _mm256_cvtps_ph((__m256)v, 0); memcpy(p, &h, sizeof h); }
#elif defined(__aarch64__)
INLINE V load(const Fp16* p) { uint16x4_t h; memcpy(&h, p, sizeof h); return (V)vcvt_f32_f16((float16x4_t)h); }
INLINE void store(Fp16* p, V v) { float16x4_t h = vcvt_f16_f32((float32x4_t)v); memcpy(p, &h, sizeof h); }
#else
INLINE float from_half(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff, bits;
    float f;
    if (rest < 0x400) {  // zero and subnormals: an integer count of 2^-24
        f = (float)rest * 0x1p-24f;
        memcpy(&bits, &f, 4);
    } else {
        bits = (rest << 13) + (rest >= 0x7c00 ? 0x70000000u : 0x38000000u);
    }
    bits |= sign;
    memcpy(&f, &bits, 4);
    return f;
}
INLINE uint16_t to_half(float f) {
    uint32_t u, sign;
    memcpy(&u, &f, 4);
    sign = (u >> 16) & 0x8000;
    u &= 0x7fffffff;
    if (u > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (u >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (u < 0x38800000) {  // the addition rounds to a count of 2^-24
        memcpy(&f, &u, 4);
        f += 0.5f;
        memcpy(&u, &f, 4);
        return (uint16_t)(sign | (u - 0x3f000000));
    }
    return (uint16_t)(sign | ((u - 0x38000000 + 0xfff + ((u >> 13) & 1)) >> 13));
}
INLINE V load(const Fp16* p) {
    V v;
    for (int i = 0; i < W; i++) v[i] = from_half(p[i].bits);
    return v;
}
INLINE void store(Fp16* p, V v) {
    for (int i = 0; i < W; i++) p[i].bits = to_half(v[i]);
}
#endif

// The first and the second of two values of a two-byte type in each 32-bit lane.
template <class T> INLINE V first_of_pair(U pair) {
    if constexpr (std::is_same_v<T, Bf16>) return (V)(pair << 16);
    H h = narrowed(pair);
    T lanes[W];
    memcpy(lanes, &h, sizeof h);
    return load(lanes);
}
template <class T> INLINE V second_of_pair(U pair) {
    if constexpr (std::is_same_v<T, Bf16>) return (V)(pair & 0xffff0000);
    return first_of_pair<T>(pair >> 16);
}

// Whether pairs of bf16 are multiplied by the CPU's own instruction where both factors are bf16. On Zen it is as fast as
// an FMA; cores with fp16 arithmetic are Intel's, and there it is slower than widening.
#if defined(__AVX512BF16__) && !defined(__AVX512FP16__)
constexpr bool DOTS = true;
#else
constexpr bool DOTS = false;
#endif

// sum + the dot products of the lanes' pairs of bf16: exact products, float sums
INLINE V dot_pair(V sum, U x, U y) {
#if defined(__AVX512BF16__)
    return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    return (V)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)x, (bfloat16x8_t)y);
#else
    sum += first_of_pair<Bf16>(x) * first_of_pair<Bf16>(y);
    return sum + second_of_pair<Bf16>(x) * second_of_pair<Bf16>(y);
#endif
}

// Pairs of bf16 from 2W floats in their order, rounded to nearest even.
INLINE U rounded_pairs(V first, V second) {
#if defined(__AVX512BF16__)
    return (U)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
#else
    Bf16 both[2 * W];
    store(both, first);
    store(both + W, second);
    U pairs;
    memcpy(&pairs, both, sizeof pairs);
    return pairs;
#endif
}

// The last n < W elements of a row; the lanes after them are zero.
template <class T> INLINE V load_part(const T* p, size_t n) {
    T part[W] = {};
    memcpy(part, p, n * sizeof(T));
    return load(part);
}
template <class T> INLINE void store_part(T* p, V v, size_t n) {
    T part[W];
    store(part, v);
    memcpy(p, part, n * sizeof(T));
}
// The first min(n, W) elements of a vector.
template <class T> INLINE V load_some(const T* p, size_t n) { return n >= W ? load(p) : load_part(p, n); }
template <class T> INLINE void store_some(T* p, V v, size_t n) {
    if (n >= W) store(p, v);
    else store_part(p, v, n);
}

// out[padded(n)] = row[n], padded with zeros.
template <class T> void widen_row(const T* row, size_t n, float* out) {
    size_t i = 0;
    for (; i + W <= n; i += W) store(out + i, load(row + i));
    if (i < n) store(out + i, load_part(row + i, n - i));
}
// row[n] += sums[n]
template <class T> void add_row(T* row, size_t n, const float* sums) {
    size_t i = 0;
    for (; i + W <= n; i += W) store(row + i, load(row + i) + load(sums + i));
    if (i < n) store_part(row + i, load_part(row + i, n - i) + load_part(sums + i, n - i), n - i);
}

// Calls f with a null pointer to the element type that `type` names.
template <class F> INLINE void with_type(int64_t type, F f) {
    switch (type) {
        case BF16: f((Bf16*)nullptr); break;
        case FP16: f((Fp16*)nullptr); break;
        default: f((float*)nullptr);
    }
}

// --- lanes ------------------------------------------------------------------------------------------------------

// Lane i of the result is lane J[i] of a and b put one after the other.
template <int... J> INLINE V pick(V a, V b) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, J...);
#else
    return __builtin_shuffle(a, b, I{J...});
#endif
}
using Lanes = std::make_integer_sequence<int, W>;
// Pairs of x[i] and y[i], two-byte elements of two vectors: `left` for the first W of them, `right` for the others.
template <int... J> INLINE void interleave(U x, U y, U& left, U& right, std::integer_sequence<int, J...>) {
    typedef uint16_t E __attribute__((vector_size(W * 4)));
#if defined(__clang__) || __GNUC__ >= 12
    left = (U)__builtin_shufflevector((E)x, (E)y, (J / 2 + J % 2 * 2 * W)...);
    right = (U)__builtin_shufflevector((E)x, (E)y, (W + J / 2 + J % 2 * 2 * W)...);
#else
    left = (U)__builtin_shuffle((E)x, (E)y, E{(J / 2 + J % 2 * 2 * W)...});
    right = (U)__builtin_shuffle((E)x, (E)y, E{(W + J / 2 + J % 2 * 2 * W)...});
#endif
}
template <int D, int... J> INLINE V low(V a, V b, std::integer_sequence<int, J...>) {
    return pick<((J & D) ? W + J - D : J)...>(a, b);
}
template <int D, int... J> INLINE V high(V a, V b, std::integer_sequence<int, J...>) {
    return pick<((J & D) ? W + J : J + D)...>(a, b);
}
template <int D, int... J> INLINE V swapped(V a, std::integer_sequence<int, J...>) { return pick<(J ^ D)...>(a, a); }

// The even quarters (four lanes each) of a, then those of b; Odd: the odd ones.
template <int Odd, int... J> INLINE V quarters(V a, V b, std::integer_sequence<int, J...>) {
    return pick<(J / 4 * 8 % W + Odd * 4 + J % 4 + J / (W / 2) * W)...>(a, b);
}
// In each quarter: D lanes of a and D of b by turns, from the quarters' lower halves; Upper: from the upper ones.
template <int D, int Upper, int... J> INLINE V zipped(V a, V b, std::integer_sequence<int, J...>) {
    return pick<(J / 4 * 4 + Upper * 2 + (D == 1 ? J % 4 / 2 : J % 2) + (D == 1 ? J % 2 : J % 4 / 2) * W)...>(a, b);
}

// Transposes a W x W matrix in place: 4 x 4 matrices within quarters of vectors first, by instructions that need no
// vector of indices, then the quarters.
INLINE void transpose(V* r) {
    V t[W];
    UNROLL
    for (int i = 0; i < W; i += 4) {
        V a = zipped<1, 0>(r[i], r[i + 1], Lanes{}), b = zipped<1, 1>(r[i], r[i + 1], Lanes{});
        V c = zipped<1, 0>(r[i + 2], r[i + 3], Lanes{}), d = zipped<1, 1>(r[i + 2], r[i + 3], Lanes{});
        t[i] = zipped<2, 0>(a, c, Lanes{});
        t[i + 1] = zipped<2, 1>(a, c, Lanes{});
        t[i + 2] = zipped<2, 0>(b, d, Lanes{});
        t[i + 3] = zipped<2, 1>(b, d, Lanes{});
    }
    UNROLL
    for (int k = 0; k < 4; k++) {
        if constexpr (W == 4) r[k] = t[k];
        if constexpr (W == 8) {
            r[k] = quarters<0>(t[k], t[4 + k], Lanes{});
            r[4 + k] = quarters<1>(t[k], t[4 + k], Lanes{});
        }
        if constexpr (W == 16) {
            V a = quarters<0>(t[k], t[4 + k], Lanes{}), b = quarters<1>(t[k], t[4 + k], Lanes{});
            V c = quarters<0>(t[8 + k], t[12 + k], Lanes{}), d = quarters<1>(t[8 + k], t[12 + k], Lanes{});
            r[k] = quarters<0>(a, c, Lanes{});
            r[4 + k] = quarters<0>(b, d, Lanes{});
            r[8 + k] = quarters<1>(a, c, Lanes{});
            r[12 + k] = quarters<1>(b, d, Lanes{});
        }
    }
}
// Lane i of the result is the sum of r[i]; every r[i] is summed in the same order.
template <int D = W / 2> INLINE V sums(V* r) {
    UNROLL
    for (int i = 0; i < D; i++) r[i] = low<D>(r[i], r[i + D], Lanes{}) + high<D>(r[i], r[i + D], Lanes{});
    if constexpr (D > 1) return sums<D / 2>(r);
    return r[0];
}
INLINE V larger(V a, V b) {  // b where either is NaN
#if defined(__AVX512F__)
    return (V)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (V)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}
constexpr float LOG2E = 1.44269504f;

// 2^x for x < 128; 0 below the smallest normal float, NaN for NaN. The polynomial is good to 2 ulp over [-1/2, 1/2].
INLINE V power_of_two(V x) {
    constexpr float magic = 0x1.8p23f;  // adding it rounds to an integer, which then stands in the lowest bits
    V floor = V{} - 126.0f;
    V whole = larger(x, floor) + magic;
    V r = x - (whole - magic);
    V p = r * 1.535336188e-4f + 1.339887440e-3f;
    p = p * r + 9.618437358e-3f;
    p = p * r + 5.550332471e-2f;
    p = p * r + 2.402264791e-1f;
    p = p * r + 6.931472029e-1f;
    p = p * r + 1.0f;
    return x < floor ? V{} : p * (V)(((U)whole + 127) << 23);
}
template <int D = W / 2> INLINE float largest(V v) {
    v = larger(v, swapped<D>(v, Lanes{}));
    if constexpr (D > 1) return largest<D / 2>(v);
    return v[0];
}
template <int D = W / 2> INLINE float total(V v) {
    v = v + swapped<D>(v, Lanes{});
    if constexpr (D > 1) return total<D / 2>(v);
    return v[0];
}

// --- the micro-kernel of expand and of both products of attention -----------------------------------------------

// c[T, 2W] = (Add: c +) a[T, k] @ b[k, 2W]
template <int T, bool Add>
void panel(const float* a, size_t lda, const float* b, size_t ldb, size_t k, float* c, size_t ldc) {
    V sum[T][2];
    UNROLL
    for (int t = 0; t < T; t++) {
        sum[t][0] = Add ? load(c + t * ldc) : V{};
        sum[t][1] = Add ? load(c + t * ldc + W) : V{};
    }
    for (size_t r = 0; r < k; r++) {
        V left = load(b + r * ldb), right = load(b + r * ldb + W);
        UNROLL
        for (int t = 0; t < T; t++) {
            float s = a[t * lda + r];
            sum[t][0] += left * s;
            sum[t][1] += right * s;
        }
    }
    UNROLL
    for (int t = 0; t < T; t++) {
        store(c + t * ldc, sum[t][0]);
        store(c + t * ldc + W, sum[t][1]);
    }
}

// Calls f with std::integral_constant<int, rows>, 1 <= rows <= TILE.
template <class F> INLINE void with_rows(int rows, F f) {
#define ROWS(n) case n: if constexpr (n <= TILE) f(std::integral_constant<int, n>{}); break;
    switch (rows) { ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8) }
#undef ROWS
}

// --- threads ----------------------------------------------------------------------------------------------------

INLINE void barrier() {
#ifdef _OPENMP
#pragma omp barrier
#endif
}

// Runs body(thread, threads) on up to `threads` threads at once; one thread runs it without waking others.
template <class F> void parallel([[maybe_unused]] int threads, F body) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        body(omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    body(0, 1);
}

// Lets memory be taken apart anew (`part_of`) that was before.
template <class T> void forget_gaps([[maybe_unused]] T* memory, [[maybe_unused]] size_t n) {
#ifdef LORA_CHECKED
    __asan_unpoison_memory_region(memory, n * sizeof(T));
#endif
}

// Memory of the calling thread, which grows and is kept; its contents are undefined. In a checked build it is never larger
// than asked for.
template <class T> T* scratch(std::vector<T>& memory, size_t n) {
#ifdef LORA_CHECKED
    if (memory.size() != n) std::vector<T>(n).swap(memory);
    forget_gaps(memory.data(), n);
#endif
    if (memory.size() < n) memory.resize(n + n / 4);
    return memory.data();
}

// --- checks of a debug build (build.py) -------------------------------------------------------------------------

// Ends the process with the sanitizer's report unless [p, p + bytes) lies in one live allocation. Every call asks this
// for all memory that it was given, before it uses any.
inline void check_memory([[maybe_unused]] const void* p, [[maybe_unused]] int64_t bytes) {
#ifdef LORA_CHECKED
    if (bytes > 0)
        if (void* bad = __asan_region_is_poisoned((void*)p, (size_t)bytes)) (void)*(volatile char*)bad;
#endif
}
// The same for rows that begin `stride` bytes apart.
inline void check_rows([[maybe_unused]] const void* p, [[maybe_unused]] int64_t rows, [[maybe_unused]] int64_t stride,
                       [[maybe_unused]] int64_t bytes) {
#ifdef LORA_CHECKED
    for (int64_t row = 0; row < rows; row++) check_memory((const char*)p + row * stride, bytes);
#endif
}

constexpr size_t GAP = 16;  // floats between parts of a thread's memory, which only a checked build leaves
// The next n floats of memory that is taken apart; a checked build puts a gap behind them that nobody may touch.
inline float* part_of(float*& memory, size_t n) {
    float* part = memory;
    memory += n;
#ifdef LORA_CHECKED
    __asan_poison_memory_region(memory, GAP * sizeof(float));
    memory += GAP;
#endif
    return part;
}
// Floats that so many parts take beside their own.
constexpr size_t gaps(size_t parts) {
#ifdef LORA_CHECKED
    return parts * GAP;
#else
    return 0 * parts;
#endif
}

}  // namespace
