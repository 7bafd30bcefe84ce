// Whether the CPU has the instructions that this library was compiled for, asked before anything else is called.
#include <cstdint>
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

// A feature's macro is 1 where the compiler may use it.
#define TEXT_OF(macro) TEXT(macro)
#define TEXT(value) #value
#define COMPILED_FOR(macro) (*TEXT_OF(macro) == '1')

// The name of an instruction set that was compiled for and is not there, or null.
extern "C" const char* lora_missing_feature() {
#if defined(__x86_64__)
    __builtin_cpu_init();
#define NEEDS(macro, name) if (COMPILED_FOR(macro) && !__builtin_cpu_supports(name)) return name;
    NEEDS(__SSE3__, "sse3") NEEDS(__SSSE3__, "ssse3") NEEDS(__SSE4_1__, "sse4.1") NEEDS(__SSE4_2__, "sse4.2")
    NEEDS(__POPCNT__, "popcnt") NEEDS(__BMI__, "bmi") NEEDS(__BMI2__, "bmi2") NEEDS(__FMA__, "fma")
    NEEDS(__AVX__, "avx") NEEDS(__AVX2__, "avx2") NEEDS(__GFNI__, "gfni")
    NEEDS(__AVX512F__, "avx512f") NEEDS(__AVX512CD__, "avx512cd") NEEDS(__AVX512BW__, "avx512bw")
    NEEDS(__AVX512DQ__, "avx512dq") NEEDS(__AVX512VL__, "avx512vl") NEEDS(__AVX512IFMA__, "avx512ifma")
    NEEDS(__AVX512VBMI__, "avx512vbmi") NEEDS(__AVX512VBMI2__, "avx512vbmi2") NEEDS(__AVX512VNNI__, "avx512vnni")
    NEEDS(__AVX512BITALG__, "avx512bitalg") NEEDS(__AVX512VPOPCNTDQ__, "avx512vpopcntdq")
#if defined(__clang__) || __GNUC__ >= 11  // names that older compilers do not know
    NEEDS(__F16C__, "f16c")
#endif
#ifdef __AVX512BF16__
    NEEDS(__AVX512BF16__, "avx512bf16")
#endif
#ifdef __AVXVNNI__
    NEEDS(__AVXVNNI__, "avxvnni")
#endif
#ifdef __AVX512FP16__
    NEEDS(__AVX512FP16__, "avx512fp16")
#endif
#elif defined(__aarch64__) && defined(__linux__)
    // Bits of <asm/hwcap.h>, which older systems do not name.
    uint64_t first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
#define NEEDS(macro, bits, bit, name) if (COMPILED_FOR(macro) && !(bits >> bit & 1)) return name;
    NEEDS(__ARM_FEATURE_ATOMICS, first, 8, "atomics") NEEDS(__ARM_FEATURE_FP16_VECTOR_ARITHMETIC, first, 10, "asimdhp")
    NEEDS(__ARM_FEATURE_QRDMX, first, 12, "asimdrdm") NEEDS(__ARM_FEATURE_DOTPROD, first, 20, "asimddp")
    NEEDS(__ARM_FEATURE_SVE, first, 22, "sve") NEEDS(__ARM_FEATURE_FP16_FML, first, 23, "asimdfhm")
    NEEDS(__ARM_FEATURE_SVE2, second, 1, "sve2") NEEDS(__ARM_FEATURE_MATMUL_INT8, second, 13, "i8mm")
    NEEDS(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC, second, 14, "bf16")
#endif
    return nullptr;
}
