// Attention of a batch of rows to a tile with AVX2. Products are of 16 bits, vpmaddwd: pairs of unsigned by signed bytes
// would saturate in vpmaddubsw. A dword of four codes becomes two of 16-bit pairs, codes 0 and 2 and codes 1 and 3.

#include "attention-avx2-cpu.h"

#include <math.h>
#include <string.h>

#ifdef GGML_EXT_X86

#    define MAX_HEAD 1024  // of every cache that the op takes

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

struct queries {
    _Alignas(32) int32_t even[BATCH][MAX_HEAD / 4];
    _Alignas(32) int32_t odd[BATCH][MAX_HEAD / 4];
};

// `rows` rows against 8 * vecs tokens from t on.
EXPAND void scores_part(const struct ggml_ext_attention_dims * dims, const struct ggml_ext_attention_tile * tile,
                        const struct ggml_ext_attention_rows * in, const struct queries * q, int t, int rows,
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

TARGET static void scores(const struct ggml_ext_attention_dims * dims, const struct ggml_ext_attention_tile * tile,
                          const struct ggml_ext_attention_rows * rows) {
    struct queries q;
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

// --- softmax ---

// 2^n in two factors: below -126 a single one would not be a number of its own.
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
TARGET static void softcap(int n, float cap, float * s) {
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
TARGET static void apply_mask(const ggml_fp16_t * mask, float slope, int n, float * s) {
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
        apply_mask(rows->mask[r], rows->slope[r], n, s);
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

TARGET static void weights(const struct ggml_ext_attention_dims * dims, const struct ggml_ext_attention_tile * tile,
                           int n, const struct ggml_ext_attention_rows * rows) {
    if (dims->planes == 2) {
        weights_of(dims, tile, n, rows, rows->n_rows, 2);
    } else {
        weights_of(dims, tile, n, rows, rows->n_rows, 1);
    }
}

// --- weights times V ---

// Weights of 16 bits are taken as w - 32768, which vpmaddwd can multiply; the sum of -32768 v comes off again.
#    define OFFSET (-32768)

struct pairs {
    _Alignas(32) int32_t even[BATCH][TILE / 4];
    _Alignas(32) int32_t odd[BATCH][TILE / 4];
};

EXPAND void pair_weights(const struct ggml_ext_attention_dims * dims, const struct ggml_ext_attention_rows * rows,
                         int g, int n_rows, int planes, struct pairs * out) {
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
                            const struct ggml_ext_attention_rows * rows, const struct pairs * w, int g, int d,
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
        struct pairs w;
        pair_weights(dims, rows, g, n_rows, planes, &w);
        for (int d = g * width; d < (g + 1) * width; d += 16) {
            accumulate_part(dims, tile, rows, &w, g, d, n_rows, planes);
        }
    }
}

TARGET static void accumulate(const struct ggml_ext_attention_dims * dims, const struct ggml_ext_attention_tile * tile,
                              const struct ggml_ext_attention_rows * rows) {
    switch (rows->n_rows * 2 + dims->planes - 1) {
        case 2:
            accumulate_rows(dims, tile, rows, 1, 1);
            break;
        case 3:
            accumulate_rows(dims, tile, rows, 1, 2);
            break;
        case 4:
            accumulate_rows(dims, tile, rows, 2, 1);
            break;
        case 5:
            accumulate_rows(dims, tile, rows, 2, 2);
            break;
        case 6:
            accumulate_rows(dims, tile, rows, 3, 1);
            break;
        case 7:
            accumulate_rows(dims, tile, rows, 3, 2);
            break;
        case 8:
            accumulate_rows(dims, tile, rows, 4, 1);
            break;
        default:
            accumulate_rows(dims, tile, rows, 4, 2);
    }
}

static bool available(void) {
    return ggml_ext_has_avx2();
}

const struct ggml_ext_attention_path ggml_ext_attention_avx2 = {
    .name       = "avx2",
    .available  = available,
    .quantize   = ggml_ext_attention_quantize_avx2,
    .scales     = ggml_ext_attention_scales_avx2,
    .levels     = ggml_ext_attention_levels_avx2,
    .pack_k     = ggml_ext_attention_pack_k_avx2,
    .pack_v     = ggml_ext_attention_pack_v_avx2,
    .scores     = scores,
    .softcap    = softcap,
    .weights    = weights,
    .accumulate = accumulate,
};

#endif  // GGML_EXT_X86
