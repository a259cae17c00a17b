// Softmax and softcap of a batch of rows with AVX2.

#include "avx2.h"

#include <math.h>
#include <string.h>

#ifdef GGML_EXT_X86

// 2^n in two factors, since an exponent field holds none below -126.
EXPAND __m256 exp2_ps(__m256 x) {
    x              = _mm256_max_ps(x, _mm256_set1_ps(GGML_EXT_EXP2_MIN));  // the bound for NaN
    const __m256 n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 r = _mm256_sub_ps(x, n);
    __m256       y = _mm256_fmadd_ps(_mm256_set1_ps(GGML_EXT_EXP2_C5), r, _mm256_set1_ps(GGML_EXT_EXP2_C4));
    y              = _mm256_fmadd_ps(y, r, _mm256_set1_ps(GGML_EXT_EXP2_C3));
    y              = _mm256_fmadd_ps(y, r, _mm256_set1_ps(GGML_EXT_EXP2_C2));
    y              = _mm256_fmadd_ps(y, r, _mm256_set1_ps(GGML_EXT_EXP2_C1));
    y              = _mm256_fmadd_ps(y, r, _mm256_set1_ps(1.0f));

    const __m256i one  = _mm256_set1_epi32(127 << 23);
    const __m256i all  = _mm256_cvtps_epi32(n);
    const __m256i half = _mm256_srai_epi32(all, 1);
    const __m256i rest = _mm256_sub_epi32(all, half);
    y                  = _mm256_mul_ps(y, _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(half, 23), one)));
    return _mm256_mul_ps(y, _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(rest, 23), one)));
}

// tanh(x) = 1 - 2 / (exp(2 x) + 1), which is 1 long before the bound
TARGET void ggml_ext_attention_softcap_avx2(int n, float cap, float * s) {
    const __m256 factor = _mm256_set1_ps(2.0f * 1.44269504088896341f);
    const __m256 bound  = _mm256_set1_ps(126.0f);
    const __m256 one    = _mm256_set1_ps(1.0f);
    for (int i = 0; i < n; i += 8) {
        const __m256 e = exp2_ps(_mm256_min_ps(bound, _mm256_mul_ps(_mm256_load_ps(s + i), factor)));
        const __m256 y = _mm256_sub_ps(one, _mm256_div_ps(_mm256_set1_ps(2.0f), _mm256_add_ps(e, one)));
        _mm256_store_ps(s + i, _mm256_mul_ps(y, _mm256_set1_ps(cap)));
    }
}

// Adds the mask to a row's logits; those beyond n become -inf.
TARGET static void attention_apply_mask(const ggml_fp16_t * mask, float slope, int n, float * s) {
    if (mask) {
        ggml_fp16_t part[TILE] = { 0 };
        if (n < TILE) {
            memcpy(part, mask, sizeof(*mask) * n);
            mask = part;
        }
        for (int t = 0; t < TILE; t += 8) {
            const __m256 m = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (mask + t)));
            _mm256_store_ps(s + t, _mm256_fmadd_ps(m, _mm256_set1_ps(slope), _mm256_load_ps(s + t)));
        }
    }
    for (int t = n; t < TILE; t++) {
        s[t] = -INFINITY;
    }
}

// Max, alpha and gamma of all rows; shift[r] is what is taken off row r's logits.
EXPAND void maxima(int n, const struct ggml_ext_attention_rows * rows, int n_rows, float shift[BATCH]) {
    __m128      max[BATCH];
#    pragma GCC unroll 4
    for (int r = 0; r < BATCH; r++) {
        max[r] = _mm_set1_ps(-INFINITY);
        if (r >= n_rows) {
            continue;
        }
        float * s = rows->s + r * TILE;
        attention_apply_mask(rows->mask[r], rows->slope[r], n, s);
        __m256 m = _mm256_load_ps(s);
#    pragma GCC unroll 8
        for (int t = 8; t < TILE; t += 8) {
            m = _mm256_max_ps(m, _mm256_load_ps(s + t));
        }
        max[r] = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
    }
    _MM_TRANSPOSE4_PS(max[0], max[1], max[2], max[3]);
    const __m128 tile_max = _mm_max_ps(_mm_max_ps(max[0], max[1]), _mm_max_ps(max[2], max[3]));
    const __m128 old_max  = _mm_loadu_ps(rows->max);
    const __m128 new_max  = _mm_max_ps(old_max, tile_max);
    const __m256 factors  = exp2_ps(_mm256_setr_m128(_mm_sub_ps(old_max, new_max), _mm_sub_ps(tile_max, new_max)));
    _mm_storeu_ps(rows->max, new_max);
    _mm_storeu_ps(rows->alpha, _mm256_castps256_ps128(factors));
    _mm_storeu_ps(rows->gamma, _mm256_extractf128_ps(factors, 1));
    const __m128 none = _mm_cmpeq_ps(tile_max, _mm_set1_ps(-INFINITY));
    _mm_storeu_ps(shift, _mm_andnot_ps(none, tile_max));
}

EXPAND void weights_of(const struct ggml_ext_attention_dims * dims, const struct ggml_ext_attention_tile * tile, int n,
                       const struct ggml_ext_attention_rows * rows, int n_rows, int planes) {
    float shift[BATCH];
    maxima(n, rows, n_rows, shift);
    for (int r = 0; r < n_rows; r++) {
        const float * s   = rows->s + r * TILE;
        float *       sum = rows->sum + r * 16;
        __m256        p[8];
#    pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            p[i] = exp2_ps(_mm256_sub_ps(_mm256_load_ps(s + 8 * i), _mm256_set1_ps(shift[r])));
        }
#    pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            const __m256 part = _mm256_add_ps(_mm256_add_ps(p[i], p[i + 2]), _mm256_add_ps(p[i + 4], p[i + 6]));
            const __m256 old  = _mm256_mul_ps(_mm256_loadu_ps(sum + 8 * i), _mm256_set1_ps(rows->alpha[r]));
            _mm256_storeu_ps(sum + 8 * i, _mm256_fmadd_ps(_mm256_set1_ps(rows->gamma[r]), part, old));
        }
        for (int g = 0; g < dims->v_groups; g++) {
            uint8_t *     out   = rows->p + (size_t) (r * dims->v_groups + g) * planes * TILE;
            const float * level = tile->v_level + g * TILE;
            // The packs work within lanes: dword 4 L + i of half h is tokens 16 i + 8 h + 4 L .. + 3.
#    pragma GCC unroll 2
            for (int h = 0; h < 2; h++, out += 32) {
                __m256i w[4];
#    pragma GCC unroll 4
                for (int i = 0; i < 4; i++) {
                    w[i] = _mm256_cvtps_epi32(_mm256_mul_ps(p[2 * i + h], _mm256_load_ps(level + 16 * i + 8 * h)));
                }
                const __m256i a = _mm256_packus_epi32(w[0], w[1]);
                const __m256i b = _mm256_packus_epi32(w[2], w[3]);
                if (planes == 2) {
                    const __m256i low = _mm256_set1_epi16(255);
                    _mm256_store_si256((__m256i *) out,
                                       _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8)));
                    _mm256_store_si256((__m256i *) (out + TILE),
                                       _mm256_packus_epi16(_mm256_and_si256(a, low), _mm256_and_si256(b, low)));
                } else {
                    _mm256_store_si256((__m256i *) out, _mm256_packus_epi16(a, b));
                }
            }
        }
    }
}

TARGET void ggml_ext_attention_weights_avx2(const struct ggml_ext_attention_dims * dims,
                                            const struct ggml_ext_attention_tile * tile, int n,
                                            const struct ggml_ext_attention_rows * rows) {
    if (dims->planes == 2) {
        weights_of(dims, tile, n, rows, rows->n_rows, 2);
    } else {
        weights_of(dims, tile, n, rows, rows->n_rows, 1);
    }
}

#endif  // GGML_EXT_X86
