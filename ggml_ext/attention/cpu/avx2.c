// Attention of a batch of rows to a tile with AVX2. Products are of 16 bits, vpmaddwd: pairs of unsigned by signed bytes
// would saturate in vpmaddubsw. A dword of four codes becomes two of 16-bit pairs, codes 0 and 2 and codes 1 and 3.

#include "avx2.h"

#include <string.h>

#ifdef GGML_EXT_X86

EXPAND __m256i load(const void * x) {
    return _mm256_load_si256((const __m256i *) x);
}

// A dword of memory in all lanes.
EXPAND __m256i broadcast(const void * x) {
    int32_t dword;
    memcpy(&dword, x, sizeof(dword));
    return _mm256_set1_epi32(dword);
}

// Signed bytes 0 and 2, and 1 and 3, of each dword.
EXPAND __m256i even_codes(__m256i x) {
    return _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8);
}

EXPAND __m256i odd_codes(__m256i x) {
    return _mm256_srai_epi16(x, 8);
}

// --- logits ---

struct attention_queries {
    _Alignas(32) int32_t even[BATCH][GGML_EXT_ATTENTION_MAX_HEAD / 4];
    _Alignas(32) int32_t odd[BATCH][GGML_EXT_ATTENTION_MAX_HEAD / 4];
};

// `rows` rows against 8 * vecs tokens from t on.
EXPAND void scores_part(const struct ggml_ext_attention_dims * dims, const struct ggml_ext_attention_tile * tile,
                        const struct ggml_ext_attention_rows * in, const struct attention_queries * q, int t, int rows,
                        int vecs) {
    const int       steps = dims->dk_pad / dims->k_groups / 4;
    const __m256i   low   = _mm256_set1_epi16(255);
    const uint8_t * k     = tile->k + t * 4;
    __m256          sum[BATCH][4];
#    pragma GCC     unroll 4
    for (int r = 0; r < rows; r++) {
#    pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) {
            sum[r][v] = _mm256_setzero_ps();
        }
    }
    for (int g = 0; g < dims->k_groups; g++) {
        __m256i acc[BATCH][4];
#    pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
#    pragma GCC unroll 4
            for (int v = 0; v < vecs; v++) {
                acc[r][v] = _mm256_set1_epi32(in->q_start[r * dims->k_groups + g]);
            }
        }
        for (int i = g * steps; i < (g + 1) * steps; i++, k += TILE * 4) {
            __m256i even[4], odd[4];
#    pragma GCC unroll 4
            for (int v = 0; v < vecs; v++) {
                const __m256i x = load(k + 32 * v);
                even[v]         = _mm256_and_si256(x, low);
                odd[v]          = _mm256_srli_epi16(x, 8);
            }
#    pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                const __m256i q_even = broadcast(&q->even[r][i]);
                const __m256i q_odd  = broadcast(&q->odd[r][i]);
#    pragma GCC unroll 4
                for (int v = 0; v < vecs; v++) {
                    acc[r][v] = _mm256_add_epi32(acc[r][v], _mm256_madd_epi16(even[v], q_even));
                    acc[r][v] = _mm256_add_epi32(acc[r][v], _mm256_madd_epi16(odd[v], q_odd));
                }
            }
        }
#    pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) {
            const __m256 scale = _mm256_load_ps(tile->k_scale + g * TILE + t + 8 * v);
#    pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                sum[r][v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[r][v]), scale, sum[r][v]);
            }
        }
    }
#    pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        const __m256 scale = _mm256_set1_ps(in->q_scale[r]);
        const __m256 bias  = _mm256_set1_ps(in->q_bias ? in->q_bias[r] : 0.0f);
#    pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) {
            _mm256_store_ps(in->s + r * TILE + t + 8 * v, _mm256_fmadd_ps(sum[r][v], scale, bias));
        }
    }
}

TARGET static void attention_scores(const struct ggml_ext_attention_dims * dims,
                                    const struct ggml_ext_attention_tile * tile,
                                    const struct ggml_ext_attention_rows * rows) {
    struct attention_queries q;
    for (int r = 0; r < rows->n_rows; r++) {
        for (int i = 0; i < dims->dk_pad; i += 32) {
            const __m256i x = load(rows->q + (size_t) r * dims->dk_pad + i);
            _mm256_store_si256((__m256i *) (q.even[r] + i / 4), even_codes(x));
            _mm256_store_si256((__m256i *) (q.odd[r] + i / 4), odd_codes(x));
        }
    }
    const int n_tokens = rows->n_rows > 2 ? 16 : 32;
    for (int t = 0; t < TILE; t += n_tokens) {
        switch (rows->n_rows) {
            case 1:
                scores_part(dims, tile, rows, &q, t, 1, 4);
                break;
            case 2:
                scores_part(dims, tile, rows, &q, t, 2, 4);
                break;
            case 3:
                scores_part(dims, tile, rows, &q, t, 3, 2);
                break;
            default:
                scores_part(dims, tile, rows, &q, t, 4, 2);
        }
    }
}

// --- weights times V ---

// Weights of 16 bits are taken as w - 32768, which vpmaddwd can multiply; the sum of -32768 v comes off again.
#    define OFFSET (-32768)

struct attention_pairs {
    _Alignas(32) int32_t even[BATCH][TILE / 4];
    _Alignas(32) int32_t odd[BATCH][TILE / 4];
};

EXPAND void pair_weights(const struct ggml_ext_attention_dims * dims, const struct ggml_ext_attention_rows * rows,
                         int g, int n_rows, int planes, struct attention_pairs * out) {
    const __m256i low  = _mm256_set1_epi16(255);
    const __m256i sign = _mm256_set1_epi16((short) OFFSET);
    for (int r = 0; r < n_rows; r++) {
        const uint8_t * p = rows->p + (size_t) (r * dims->v_groups + g) * planes * TILE;
#    pragma GCC unroll 2
        for (int i = 0; i < TILE; i += 32) {
            const __m256i x    = load(p + i);
            __m256i       even = _mm256_and_si256(x, low);
            __m256i       odd  = _mm256_srli_epi16(x, 8);
            if (planes == 2) {
                const __m256i y = load(p + TILE + i);
                even = _mm256_xor_si256(_mm256_or_si256(_mm256_slli_epi16(even, 8), _mm256_and_si256(y, low)), sign);
                odd  = _mm256_xor_si256(_mm256_or_si256(_mm256_slli_epi16(odd, 8), _mm256_srli_epi16(y, 8)), sign);
            }
            _mm256_store_si256((__m256i *) (out->even[r] + i / 4), even);
            _mm256_store_si256((__m256i *) (out->odd[r] + i / 4), odd);
        }
    }
}

// 16 channels from d on.
EXPAND void accumulate_part(const struct ggml_ext_attention_dims * dims, const struct ggml_ext_attention_tile * tile,
                            const struct ggml_ext_attention_rows * rows, const struct attention_pairs * w, int g, int d,
                            int n_rows, int planes) {
    const __m256i  offset = _mm256_set1_epi16((short) OFFSET);
    const int8_t * v      = tile->v + d * 4;
    __m256i        acc[BATCH][2], base[2];
#    pragma GCC    unroll 2
    for (int i = 0; i < 2; i++) {
        base[i] = _mm256_setzero_si256();
#    pragma GCC unroll 4
        for (int r = 0; r < n_rows; r++) {
            acc[r][i] = base[i];
        }
    }
    for (int j = 0; j < TILE / 4; j++, v += (size_t) dims->dv_pad * 4) {
        const __m256i x[2] = { load(v), load(v + 32) };
#    pragma GCC unroll 2
        for (int odd = 0; odd < 2; odd++) {
            const __m256i y[2] = { odd ? odd_codes(x[0]) : even_codes(x[0]), odd ? odd_codes(x[1]) : even_codes(x[1]) };
#    pragma GCC unroll 4
            for (int r = 0; r < n_rows; r++) {
                const __m256i weight = broadcast(odd ? &w->odd[r][j] : &w->even[r][j]);
                acc[r][0]            = _mm256_add_epi32(acc[r][0], _mm256_madd_epi16(y[0], weight));
                acc[r][1]            = _mm256_add_epi32(acc[r][1], _mm256_madd_epi16(y[1], weight));
            }
            if (planes == 2) {
                base[0] = _mm256_add_epi32(base[0], _mm256_madd_epi16(y[0], offset));
                base[1] = _mm256_add_epi32(base[1], _mm256_madd_epi16(y[1], offset));
            }
        }
    }
#    pragma GCC unroll 4
    for (int r = 0; r < n_rows; r++) {
        const __m256 alpha = _mm256_set1_ps(rows->alpha[r]);
        const __m256 beta  = _mm256_set1_ps(rows->gamma[r] * tile->v_unit[g]);
        float *      o     = rows->o + (size_t) r * dims->dv_pad + d;
#    pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            const __m256 sum = _mm256_cvtepi32_ps(_mm256_sub_epi32(acc[r][i], base[i]));
            const __m256 old = _mm256_mul_ps(_mm256_load_ps(o + 8 * i), alpha);
            _mm256_store_ps(o + 8 * i, _mm256_fmadd_ps(sum, beta, old));
        }
    }
}

EXPAND void accumulate_rows(const struct ggml_ext_attention_dims * dims, const struct ggml_ext_attention_tile * tile,
                            const struct ggml_ext_attention_rows * rows, int n_rows, int planes) {
    const int width = dims->dv_pad / dims->v_groups;
    for (int g = 0; g < dims->v_groups; g++) {
        struct attention_pairs w;
        pair_weights(dims, rows, g, n_rows, planes, &w);
        for (int d = g * width; d < (g + 1) * width; d += 16) {
            accumulate_part(dims, tile, rows, &w, g, d, n_rows, planes);
        }
    }
}

TARGET static void attention_accumulate(const struct ggml_ext_attention_dims * dims,
                                        const struct ggml_ext_attention_tile * tile,
                                        const struct ggml_ext_attention_rows * rows) {
    WITH_CONSTANTS(rows->n_rows, dims->planes, accumulate_rows, dims, tile, rows);
}

const struct ggml_ext_attention_path ggml_ext_attention_avx2 = {
    .name       = "avx2",
    .available  = ggml_ext_has_avx2,
    .quantize   = ggml_ext_attention_quantize_avx2,
    .scales     = ggml_ext_attention_scales_avx2,
    .levels     = ggml_ext_attention_levels_avx2,
    .pack_k     = ggml_ext_attention_pack_k_avx2,
    .pack_v     = ggml_ext_attention_pack_v_avx2,
    .scores     = attention_scores,
    .softcap    = ggml_ext_attention_softcap_avx2,
    .weights    = ggml_ext_attention_weights_avx2,
    .accumulate = attention_accumulate,
};

#endif  // GGML_EXT_X86
