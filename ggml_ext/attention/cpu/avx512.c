// Attention of a batch of rows to a tile with AVX-512 and VNNI.

#include "avx512.h"

#include <math.h>
#include <string.h>

#ifdef GGML_EXT_X86

// One load for all rows: GCC would load again in every vpdpbusd.
EXPAND __m512i load_once(const void * x) {
    __m512i v = _mm512_load_si512(x);
    __asm__("" : "+v"(v));
    return v;
}

// --- logits ---

// `rows` rows against 16 * vecs tokens from t on. 8 accumulators hide the latency of vpdpbusd.
EXPAND void scores_part(const struct ggml_ext_attention_dims * dims, const struct ggml_ext_attention_tile * tile,
                        const struct ggml_ext_attention_rows * in, int t, int rows, int vecs) {
    const int       steps = dims->dk_pad / dims->k_groups / 4;
    const uint8_t * k     = tile->k + t * 4;
    const int8_t *  q     = in->q;
    __m512          sum[BATCH][4];
#    pragma GCC     unroll 4
    for (int r = 0; r < rows; r++) {
#    pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) {
            sum[r][v] = _mm512_setzero_ps();
        }
    }
    for (int g = 0; g < dims->k_groups; g++) {
        __m512i acc[BATCH][4];
#    pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
#    pragma GCC unroll 4
            for (int v = 0; v < vecs; v++) {
                acc[r][v] = _mm512_set1_epi32(in->q_start[r * dims->k_groups + g]);
            }
        }
        for (int i = 0; i < steps; i++, k += TILE * 4, q += 4) {
            __m512i kv[4];
#    pragma GCC unroll 4
            for (int v = 0; v < vecs; v++) {
                kv[v] = load_once(k + 64 * v);
            }
#    pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                int32_t four;
                memcpy(&four, q + (size_t) r * dims->dk_pad, sizeof(four));
                const __m512i qv = _mm512_set1_epi32(four);
#    pragma GCC unroll 4
                for (int v = 0; v < vecs; v++) {
                    acc[r][v] = _mm512_dpbusd_epi32(acc[r][v], kv[v], qv);
                }
            }
        }
#    pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) {
            const __m512 scale = _mm512_load_ps(tile->k_scale + g * TILE + t + 16 * v);
#    pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                sum[r][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[r][v]), scale, sum[r][v]);
            }
        }
    }
#    pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        const __m512 scale = _mm512_set1_ps(in->q_scale[r]);
        const __m512 bias  = _mm512_set1_ps(in->q_bias ? in->q_bias[r] : 0.0f);
#    pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) {
            _mm512_store_ps(in->s + r * TILE + t + 16 * v, _mm512_fmadd_ps(sum[r][v], scale, bias));
        }
    }
}

TARGET static void attention_scores(const struct ggml_ext_attention_dims * dims,
                                    const struct ggml_ext_attention_tile * tile,
                                    const struct ggml_ext_attention_rows * rows) {
    switch (rows->n_rows) {
        case 1:
            scores_part(dims, tile, rows, 0, 1, 4);
            break;
        case 2:
            scores_part(dims, tile, rows, 0, 2, 4);
            break;
        case 3:
            scores_part(dims, tile, rows, 0, 3, 2);
            scores_part(dims, tile, rows, 32, 3, 2);
            break;
        default:
            scores_part(dims, tile, rows, 0, 4, 2);
            scores_part(dims, tile, rows, 32, 4, 2);
    }
}

// --- softmax ---

EXPAND __m512 exp2_ps(__m512 x) {
    x              = _mm512_max_ps(x, _mm512_set1_ps(GGML_EXT_EXP2_MIN));  // the bound for NaN
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_sub_ps(x, n);
    __m512       y = _mm512_fmadd_ps(_mm512_set1_ps(GGML_EXT_EXP2_C5), r, _mm512_set1_ps(GGML_EXT_EXP2_C4));
    y              = _mm512_fmadd_ps(y, r, _mm512_set1_ps(GGML_EXT_EXP2_C3));
    y              = _mm512_fmadd_ps(y, r, _mm512_set1_ps(GGML_EXT_EXP2_C2));
    y              = _mm512_fmadd_ps(y, r, _mm512_set1_ps(GGML_EXT_EXP2_C1));
    return _mm512_scalef_ps(_mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f)), n);
}

// tanh(x) = 1 - 2 / (exp(2 x) + 1); an overflow to infinity gives 1
TARGET static void attention_softcap(int n, float cap, float * s) {
    const __m512 factor = _mm512_set1_ps(2.0f * 1.44269504088896341f);
    const __m512 one    = _mm512_set1_ps(1.0f);
    for (int i = 0; i < n; i += 16) {
        const __m512 e = exp2_ps(_mm512_mul_ps(_mm512_load_ps(s + i), factor));
        const __m512 y = _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(e, one)));
        _mm512_store_ps(s + i, _mm512_mul_ps(y, _mm512_set1_ps(cap)));
    }
}

// The maxima of four vectors, as [0 1 2 3] in every lane.
EXPAND __m512 max_of_four(const __m512 x[4]) {
    const __m512 a = _mm512_max_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    const __m512 b = _mm512_max_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    __m512       m = _mm512_max_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    m              = _mm512_max_ps(m, _mm512_shuffle_f32x4(m, m, 0xb1));
    return _mm512_max_ps(m, _mm512_shuffle_f32x4(m, m, 0x4e));
}

EXPAND void weights_of(const struct ggml_ext_attention_dims * dims, const struct ggml_ext_attention_tile * tile, int n,
                       const struct ggml_ext_attention_rows * rows, int n_rows, int planes) {
    const __m512 infinity = _mm512_set1_ps(-INFINITY);
    __m512       max[BATCH];
#    pragma GCC  unroll 4
    for (int r = 0; r < BATCH; r++) {
        max[r] = infinity;
        if (r >= n_rows) {
            continue;
        }
        float * s = rows->s + r * TILE;
        if (rows->mask[r] || n < TILE) {
            for (int t = 0; t < TILE; t += 16) {
                const __mmask16 valid = t < n ? ggml_ext_mask16(n - t) : 0;
                __m512          x     = _mm512_load_ps(s + t);
                if (rows->mask[r]) {
                    const __m256i half = _mm256_maskz_loadu_epi16(valid, rows->mask[r] + t);
                    x                  = _mm512_fmadd_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(rows->slope[r]), x);
                }
                _mm512_store_ps(s + t, _mm512_mask_mov_ps(infinity, valid, x));
            }
        }
        max[r] = _mm512_max_ps(_mm512_max_ps(_mm512_load_ps(s), _mm512_load_ps(s + 16)),
                               _mm512_max_ps(_mm512_load_ps(s + 32), _mm512_load_ps(s + 48)));
    }
    const __m512 tile_max = max_of_four(max);
    const __m512 old_max  = _mm512_broadcast_f32x4(_mm_loadu_ps(rows->max));
    const __m512 new_max  = _mm512_max_ps(old_max, tile_max);
    // Lane 0: alpha, the others: gamma.
    const __m512 factors  = exp2_ps(_mm512_sub_ps(_mm512_mask_mov_ps(tile_max, 0x000f, old_max), new_max));
    _mm_storeu_ps(rows->max, _mm512_castps512_ps128(new_max));
    _mm_storeu_ps(rows->alpha, _mm512_castps512_ps128(factors));
    _mm_storeu_ps(rows->gamma, _mm512_extractf32x4_ps(factors, 1));

    const __m512 finite = _mm512_mask_mov_ps(tile_max, _mm512_cmpeq_ps_mask(tile_max, infinity), _mm512_setzero_ps());
    __m512       shift[BATCH] = { _mm512_permute_ps(finite, 0x00), _mm512_permute_ps(finite, 0x55),
                                  _mm512_permute_ps(finite, 0xaa), _mm512_permute_ps(finite, 0xff) };
#    pragma GCC  unroll 4
    for (int r = 0; r < n_rows; r++) {
        const float * s = rows->s + r * TILE;
        __m512        p[4];
#    pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            p[i] = exp2_ps(_mm512_sub_ps(_mm512_load_ps(s + 16 * i), shift[r]));
        }
        const __m512 sum = _mm512_add_ps(_mm512_add_ps(p[0], p[1]), _mm512_add_ps(p[2], p[3]));
        const __m512 old = _mm512_mul_ps(_mm512_loadu_ps(rows->sum + r * 16), _mm512_set1_ps(rows->alpha[r]));
        _mm512_storeu_ps(rows->sum + r * 16, _mm512_fmadd_ps(_mm512_set1_ps(rows->gamma[r]), sum, old));

        for (int g = 0; g < dims->v_groups; g++) {
            uint8_t *     out   = rows->p + (size_t) (r * dims->v_groups + g) * planes * TILE;
            const float * level = tile->v_level + g * TILE;
            __m512i       w[4];
#    pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                w[i] = _mm512_cvtps_epi32(_mm512_mul_ps(p[i], _mm512_load_ps(level + 16 * i)));
            }
            // The packs work within lanes: dword 4 L + i of the result is tokens 16 i + 4 L .. + 3.
            const __m512i a = _mm512_packus_epi32(w[0], w[1]);
            const __m512i b = _mm512_packus_epi32(w[2], w[3]);
            if (planes == 2) {
                const __m512i low = _mm512_set1_epi16(255);
                _mm512_store_si512(out, _mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8)));
                _mm512_store_si512(out + TILE, _mm512_packus_epi16(_mm512_and_si512(a, low), _mm512_and_si512(b, low)));
            } else {
                _mm512_store_si512(out, _mm512_packus_epi16(a, b));
            }
        }
    }
}

TARGET static void attention_weights(const struct ggml_ext_attention_dims * dims,
                                     const struct ggml_ext_attention_tile * tile, int n,
                                     const struct ggml_ext_attention_rows * rows) {
    WITH_CONSTANTS(rows->n_rows, dims->planes, weights_of, dims, tile, n, rows);
}

// --- weights times V ---

EXPAND void accumulate_rows(const struct ggml_ext_attention_dims * dims, const struct ggml_ext_attention_tile * tile,
                            const struct ggml_ext_attention_rows * rows, int n_rows, int planes) {
    const int width = dims->dv_pad / dims->v_groups;
    for (int d = 0; d < dims->dv_pad; d += 32) {
        const int       g      = d / width;
        const int8_t *  v      = tile->v + d * 4;
        const uint8_t * p      = rows->p + (size_t) g * planes * TILE;
        const size_t    stride = (size_t) dims->v_groups * planes * TILE;
        __m512i         acc[BATCH][2][2];
#    pragma GCC unroll 4
        for (int r = 0; r < n_rows; r++) {
#    pragma GCC unroll 2
            for (int plane = 0; plane < planes; plane++) {
                acc[r][plane][0] = acc[r][plane][1] = _mm512_setzero_si512();
            }
        }
        for (int j = 0; j < TILE / 4; j++, v += (size_t) dims->dv_pad * 4, p += 4) {
            const __m512i v0 = load_once(v);
            const __m512i v1 = load_once(v + 64);
#    pragma GCC unroll 4
            for (int r = 0; r < n_rows; r++) {
#    pragma GCC unroll 2
                for (int plane = 0; plane < planes; plane++) {
                    int32_t four;
                    memcpy(&four, p + r * stride + plane * TILE, sizeof(four));
                    const __m512i w  = _mm512_set1_epi32(four);
                    acc[r][plane][0] = _mm512_dpbusd_epi32(acc[r][plane][0], w, v0);
                    acc[r][plane][1] = _mm512_dpbusd_epi32(acc[r][plane][1], w, v1);
                }
            }
        }
#    pragma GCC unroll 4
        for (int r = 0; r < n_rows; r++) {
            const __m512 alpha = _mm512_set1_ps(rows->alpha[r]);
            const __m512 beta  = _mm512_set1_ps(rows->gamma[r] * tile->v_unit[g]);
            float *      o     = rows->o + (size_t) r * dims->dv_pad + d;
#    pragma GCC unroll 2
            for (int i = 0; i < 2; i++) {
                __m512i sum = acc[r][0][i];
                if (planes == 2) {
                    sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 8), acc[r][1][i]);
                }
                const __m512 old = _mm512_mul_ps(_mm512_load_ps(o + 16 * i), alpha);
                _mm512_store_ps(o + 16 * i, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), beta, old));
            }
        }
    }
}

TARGET static void attention_accumulate(const struct ggml_ext_attention_dims * dims,
                                        const struct ggml_ext_attention_tile * tile,
                                        const struct ggml_ext_attention_rows * rows) {
    WITH_CONSTANTS(rows->n_rows, dims->planes, accumulate_rows, dims, tile, rows);
}

const struct ggml_ext_attention_path ggml_ext_attention_avx512 = {
    .name       = "avx512-vnni",
    .available  = ggml_ext_has_avx512_vbmi,
    .quantize   = ggml_ext_attention_quantize_avx512,
    .scales     = ggml_ext_attention_scales_avx2,
    .levels     = ggml_ext_attention_levels_avx512,
    .pack_k     = ggml_ext_attention_pack_k_avx512,
    .pack_v     = ggml_ext_attention_pack_v_avx512,
    .scores     = attention_scores,
    .softcap    = attention_softcap,
    .weights    = attention_weights,
    .accumulate = attention_accumulate,
};

#endif  // GGML_EXT_X86
