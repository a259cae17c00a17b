// Attention tiles with AVX-512, VNNI and VBMI.

#include "attention-cpu.h"
#include "ggml-quants.h"    // the blocks
#include "x86.h"
#define GGML_COMMON_IMPL_C  // the table of iq4_nl
#include "ggml-common.h"

#include <math.h>
#include <string.h>

#ifdef GGML_EXT_X86

#    define TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")))
// Row counts and planes are constants where a kernel is expanded.
#    define EXPAND TARGET static inline __attribute__((always_inline))
#    define TILE   GGML_EXT_ATTENTION_TILE
#    define GROUP  GGML_EXT_ATTENTION_GROUP
#    define BATCH  GGML_EXT_ATTENTION_BATCH

static bool available(void) {
    return ggml_ext_has_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
}

TARGET static float quantize(int n, int n_pad, const float * x, int8_t * codes) {
    const float  max     = ggml_ext_abs_max_avx512(n, x);
    const __m512 inverse = _mm512_set1_ps(max > 0.0f ? 127.0f / max : 0.0f);
    for (int i = 0; i < n_pad; i += 16) {
        const __mmask16 mask = i < n ? ggml_ext_mask16(n - i) : 0;
        const __m512i   c    = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), inverse));
        _mm_storeu_si128((__m128i *) (codes + i), _mm512_cvtsepi32_epi8(c));
    }
    return max / 127.0f;
}

// --- scales ---

EXPAND __m128i eight_halves(const char * const * rows, size_t at) {
    uint16_t    h[8];
#    pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        memcpy(&h[i], rows[i] + at, sizeof(h[i]));
    }
    return _mm_setr_epi16((short) h[0], (short) h[1], (short) h[2], (short) h[3], (short) h[4], (short) h[5],
                          (short) h[6], (short) h[7]);
}

TARGET static void scales(int n_blocks, size_t block_size, const char * const * rows, float * out) {
    for (int t = 0; t < TILE; t += 8) {
        for (int g = 0; g < n_blocks; g++) {
            _mm256_store_ps(out + g * TILE + t, _mm256_cvtph_ps(eight_halves(rows + t, g * block_size)));
        }
    }
}

TARGET static bool levels(int n_groups, float n_levels, float * scale, float * unit, int8_t * negate) {
    __mmask16 negative = 0;
    for (int g = 0; g < n_groups; g++, scale += TILE, negate += TILE) {
        __m512 x[4];
#    pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            x[i]                  = _mm512_load_ps(scale + 16 * i);
            const __mmask16 below = _mm512_cmp_ps_mask(x[i], _mm512_setzero_ps(), _CMP_LT_OQ);
            negative |= below;
            _mm_storeu_si128((__m128i *) (negate + 16 * i), _mm_movm_epi8(below));
            x[i] = _mm512_abs_ps(x[i]);
        }
        const float max = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(x[0], x[1]), _mm512_max_ps(x[2], x[3])));
        unit[g]         = max / n_levels;
        const __m512 inverse = _mm512_set1_ps(max > 0.0f ? n_levels / max : 0.0f);
#    pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            _mm512_store_ps(scale + 16 * i, _mm512_mul_ps(x[i], inverse));
        }
    }
    return negative != 0;
}

// --- codes ---

// Where block g of a row keeps its codes, and the 16 codes that nibbles stand for.
struct source {
    size_t stride, offset;
    bool   nibbles;
    int8_t table[16];
};

static struct source source_of(enum ggml_type type) {
    struct source s = { 0 };
    switch (type) {
        case GGML_TYPE_Q8_0:
            s.stride = sizeof(block_q8_0);
            s.offset = offsetof(block_q8_0, qs);
            break;
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_IQ4_NL:
            s.stride  = sizeof(block_q4_0);
            s.offset  = offsetof(block_q4_0, qs);
            s.nibbles = true;
            for (int i = 0; i < 16; i++) {
                s.table[i] = (int8_t) (type == GGML_TYPE_Q4_0 ? i - 8 : kvalues_iq4nl[i]);
            }
            break;
        case GGML_TYPE_I8:
            s.stride = GROUP;
            break;
        default:
            GGML_ABORT("attention: no codes for type %s", ggml_type_name(type));
    }
    return s;
}

EXPAND __m512i four_lanes(const char * a, const char * b, const char * c, const char * d) {
    __m512i x = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *) a));
    x         = _mm512_mask_broadcast_i32x4(x, 0x00f0, _mm_loadu_si128((const __m128i *) b));
    x         = _mm512_mask_broadcast_i32x4(x, 0x0f00, _mm_loadu_si128((const __m128i *) c));
    return _mm512_mask_broadcast_i32x4(x, 0xf000, _mm_loadu_si128((const __m128i *) d));
}

// 16 bytes of each of 16 tokens -> out[i]: bytes 4 i .. 4 i + 3 of all tokens. Lane L of z[j] is token 4 L + j.
EXPAND void transpose16(const char * const * rows, size_t at, __m512i out[4]) {
    __m512i     z[4];
#    pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        z[j] = four_lanes(rows[j] + at, rows[4 + j] + at, rows[8 + j] + at, rows[12 + j] + at);
    }
    const __m512i a = _mm512_unpacklo_epi32(z[0], z[1]);
    const __m512i b = _mm512_unpackhi_epi32(z[0], z[1]);
    const __m512i c = _mm512_unpacklo_epi32(z[2], z[3]);
    const __m512i d = _mm512_unpackhi_epi32(z[2], z[3]);
    out[0]          = _mm512_unpacklo_epi64(a, c);
    out[1]          = _mm512_unpackhi_epi64(a, c);
    out[2]          = _mm512_unpacklo_epi64(b, d);
    out[3]          = _mm512_unpackhi_epi64(b, d);
}

TARGET static void pack_k(enum ggml_type type, const char * const * rows, int n_blocks, uint8_t * k) {
    const struct source s      = source_of(type);
    const __m512i       offset = _mm512_set1_epi8((char) 0x80);
    const __m512i       low    = _mm512_set1_epi8(15);
    const __m512i table = _mm512_xor_si512(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) s.table)), offset);
    for (int g = 0; g < n_blocks; g++) {
        uint8_t * out = k + (size_t) g * GROUP * TILE;
        for (int t = 0; t < TILE; t += 16) {
            __m512i x[4];
            for (int half = 0; half < (s.nibbles ? 1 : 2); half++) {
                transpose16(rows + t, g * s.stride + s.offset + 16 * half, x);
#    pragma GCC unroll 4
                for (int i = 0; i < 4; i++) {
                    uint8_t * at = out + ((half * 4 + i) * TILE + t) * 4;
                    if (s.nibbles) {
                        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(x[i], 4), low);
                        _mm512_store_si512(at, _mm512_shuffle_epi8(table, _mm512_and_si512(x[i], low)));
                        _mm512_store_si512(at + 4 * TILE * 4, _mm512_shuffle_epi8(table, high));
                    } else {
                        _mm512_store_si512(at, _mm512_xor_si512(x[i], offset));
                    }
                }
            }
        }
    }
}

EXPAND __m512i two_halves(const char * a, const char * b) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *) a)),
                              _mm256_loadu_si256((const __m256i *) b), 1);
}

TARGET static void pack_v(enum ggml_type type, const char * const * rows, int n_blocks, const int8_t * negate,
                          int8_t * v) {
    const struct source s = source_of(type);
    const size_t        d = (size_t) n_blocks * GROUP;
    // Byte 4 i + u of the result is code i of token u; from 32-byte rows in two registers, and from 16-byte rows in one.
    uint8_t             from32[64], from16[64];
    for (int i = 0; i < 64; i++) {
        from32[i] = (uint8_t) (i % 4 * 32 + i / 4);
        from16[i] = (uint8_t) (i % 4 * 16 + i / 4);
    }
    const __m512i first  = _mm512_loadu_si512(from32);
    const __m512i second = _mm512_add_epi8(first, _mm512_set1_epi8(16));
    const __m512i single = _mm512_loadu_si512(from16);
    const __m512i low    = _mm512_set1_epi8(15);
    const __m512i table  = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) s.table));
    for (int j = 0; j < TILE / 4; j++) {
        const int            t   = 16 * (j % 4) + 4 * (j / 4);
        const char * const * row = rows + t;
        for (int g = 0; g < n_blocks; g++) {
            const size_t at = g * s.stride + s.offset;
            __m512i      x, y;
            if (s.nibbles) {
                x = _mm512_permutexvar_epi8(single, four_lanes(row[0] + at, row[1] + at, row[2] + at, row[3] + at));
                y = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(x, 4), low));
                x = _mm512_shuffle_epi8(table, _mm512_and_si512(x, low));
            } else {
                const __m512i a = two_halves(row[0] + at, row[1] + at);
                const __m512i b = two_halves(row[2] + at, row[3] + at);
                x               = _mm512_permutex2var_epi8(a, first, b);
                y               = _mm512_permutex2var_epi8(a, second, b);
            }
            if (negate) {
                int32_t signs;
                memcpy(&signs, negate + g * TILE + t, sizeof(signs));
                const __m512i sign = _mm512_set1_epi32(signs);
                x                  = _mm512_sub_epi8(_mm512_xor_si512(x, sign), sign);
                y                  = _mm512_sub_epi8(_mm512_xor_si512(y, sign), sign);
            }
            int8_t * out = v + (j * d + g * GROUP) * 4;
            _mm512_store_si512(out, x);
            _mm512_store_si512(out + 64, y);
        }
    }
}

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

TARGET static void scores(const struct ggml_ext_attention_dims * dims, const struct ggml_ext_attention_tile * tile,
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
TARGET static void softcap(int n, float cap, float * s) {
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

TARGET static void weights(const struct ggml_ext_attention_dims * dims, const struct ggml_ext_attention_tile * tile,
                           int n, const struct ggml_ext_attention_rows * rows) {
    switch (rows->n_rows * 2 + dims->planes - 1) {
        case 2:
            weights_of(dims, tile, n, rows, 1, 1);
            break;
        case 3:
            weights_of(dims, tile, n, rows, 1, 2);
            break;
        case 4:
            weights_of(dims, tile, n, rows, 2, 1);
            break;
        case 5:
            weights_of(dims, tile, n, rows, 2, 2);
            break;
        case 6:
            weights_of(dims, tile, n, rows, 3, 1);
            break;
        case 7:
            weights_of(dims, tile, n, rows, 3, 2);
            break;
        case 8:
            weights_of(dims, tile, n, rows, 4, 1);
            break;
        default:
            weights_of(dims, tile, n, rows, 4, 2);
    }
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

const struct ggml_ext_attention_path ggml_ext_attention_avx512 = {
    .name       = "avx512-vnni",
    .available  = available,
    .quantize   = quantize,
    .scales     = scales,
    .levels     = levels,
    .pack_k     = pack_k,
    .pack_v     = pack_v,
    .scores     = scores,
    .softcap    = softcap,
    .weights    = weights,
    .accumulate = accumulate,
};

#endif  // GGML_EXT_X86
