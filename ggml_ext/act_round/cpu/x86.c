// The inner loops of GGML_EXT_OP_ACT_ROUND for AVX-512 and AVX2.

#include "core/x86.h"

#include "act_round.h"

#ifdef GGML_EXT_X86

// vminps and vmaxps give their second operand where one is NaN.

GGML_EXT_AVX512 static void act_round_avx512(int64_t n, float scale, float q_max, const float * x, float * y) {
    const __m512 s    = _mm512_set1_ps(scale);
    const __m512 high = _mm512_set1_ps(q_max);
    const __m512 low  = _mm512_set1_ps(-q_max);
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 mask = ggml_ext_mask16(n - i);
        const __m512    v    = _mm512_div_ps(_mm512_maskz_loadu_ps(mask, x + i), s);
        const __m512    q    = _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm512_mask_storeu_ps(y + i, mask, _mm512_mul_ps(_mm512_min_ps(high, _mm512_max_ps(low, q)), s));
    }
}

GGML_EXT_AVX2 static void act_round_avx2(int64_t n, float scale, float q_max, const float * x, float * y) {
    const __m256 s    = _mm256_set1_ps(scale);
    const __m256 high = _mm256_set1_ps(q_max);
    const __m256 low  = _mm256_set1_ps(-q_max);
    int64_t      i    = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256 v = _mm256_div_ps(_mm256_loadu_ps(x + i), s);
        const __m256 q = _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm256_storeu_ps(y + i, _mm256_mul_ps(_mm256_min_ps(high, _mm256_max_ps(low, q)), s));
    }
    ggml_ext_act_round_generic.round(n - i, scale, q_max, x + i, y + i);
}

const struct ggml_ext_act_round_path ggml_ext_act_round_avx512 = {
    "avx512",
    ggml_ext_has_avx512,
    ggml_ext_abs_max_avx512,
    act_round_avx512,
};
const struct ggml_ext_act_round_path ggml_ext_act_round_avx2 = {
    "avx2",
    ggml_ext_has_avx2,
    ggml_ext_abs_max_avx2,
    act_round_avx2,
};

#endif  // GGML_EXT_X86
