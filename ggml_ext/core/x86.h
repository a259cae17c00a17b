// x86 SIMD, chosen at run time: function attributes give each path its instructions. An attribute adds to what the
// command line allows, and the compiler then uses all of it: files with these attributes are named *-x86*, *-avx*, and
// cmake/inject.cmake compiles them for plain x86-64. Included by files of cpu/ and sampler/ only.

#ifndef GGML_EXT_X86_H
#define GGML_EXT_X86_H

#include "x86_features.h"

#include <stdbool.h>
#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__)
#    define GGML_EXT_X86 1
#    include <immintrin.h>

#    define GGML_EXT_ISA_AVX2        "avx2,fma,f16c,popcnt"
#    define GGML_EXT_ISA_AVX512      GGML_EXT_ISA_AVX2 ",avx512f,avx512bw,avx512vl,avx512dq"
#    define GGML_EXT_ISA_AVX512_VNNI GGML_EXT_ISA_AVX512 ",avx512vnni"

#    define GGML_EXT_AVX2        __attribute__((target(GGML_EXT_ISA_AVX2)))
#    define GGML_EXT_AVX512      __attribute__((target(GGML_EXT_ISA_AVX512)))
#    define GGML_EXT_AVX512_VNNI __attribute__((target(GGML_EXT_ISA_AVX512_VNNI)))
#    define GGML_EXT_AVX512_VBMI __attribute__((target(GGML_EXT_ISA_AVX512_VNNI ",avx512vbmi")))

// Compilers know AVX-VNNI from GCC 11 and Clang 12 on.
#    if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11
#        define GGML_EXT_AVX_VNNI __attribute__((target(GGML_EXT_ISA_AVX2 ",avxvnni")))
#    endif

// The first `count` lanes, all for 16 and more.
static inline uint16_t ggml_ext_mask16(int64_t count) {
    return count >= 16 ? 0xffff : (uint16_t) ((1u << count) - 1);
}

// Largest |x|, 0 for n = 0. vmaxps gives its second operand where one is NaN, so NaN counts for nothing.
GGML_EXT_AVX512 static inline float ggml_ext_abs_max_avx512(int64_t n, const float * x) {
    __m512 max = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 16) {
        max = _mm512_max_ps(_mm512_abs_ps(_mm512_maskz_loadu_ps(ggml_ext_mask16(n - i), x + i)), max);
    }
    return _mm512_reduce_max_ps(max);
}

GGML_EXT_AVX2 static inline float ggml_ext_abs_max_avx2(int64_t n, const float * x) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256       max       = _mm256_setzero_ps();
    int64_t      i         = 0;
    for (; i + 8 <= n; i += 8) {
        max = _mm256_max_ps(_mm256_and_ps(_mm256_loadu_ps(x + i), magnitude), max);
    }
    __m128 r     = _mm_max_ps(_mm256_castps256_ps128(max), _mm256_extractf128_ps(max, 1));
    r            = _mm_max_ps(r, _mm_movehl_ps(r, r));
    r            = _mm_max_ss(r, _mm_movehdup_ps(r));
    float result = _mm_cvtss_f32(r);
    for (; i < n; i++) {
        const float v = __builtin_fabsf(x[i]);
        result        = v > result ? v : result;
    }
    return result;
}
#endif

#endif  // GGML_EXT_X86_H
