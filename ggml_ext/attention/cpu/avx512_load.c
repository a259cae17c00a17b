// The decoding of queries and of tiles of K and V with AVX-512 and VBMI.

#include "avx512.h"

#include <float.h>
#include <math.h>
#include <string.h>

#ifdef GGML_EXT_X86

TARGET float ggml_ext_attention_quantize_avx512(int n, int n_pad, const float * x, int8_t * codes) {
    // Magnitudes order as integers, NaN above Inf.
    __m512i largest = _mm512_setzero_si512();
    for (int i = 0; i < n; i += 16) {
        const __m512 v = _mm512_abs_ps(_mm512_maskz_loadu_ps(ggml_ext_mask16(n - i), x + i));
        largest        = _mm512_max_epi32(largest, _mm512_castps_si512(v));
    }
    const int32_t bits = _mm512_reduce_max_epi32(largest);
    float         max;
    memcpy(&max, &bits, sizeof(max));
    if (!isfinite(max) || !(127.0f / max <= FLT_MAX)) {
        memset(codes, 0, n_pad);
        return isfinite(max) ? 0.0f : NAN;
    }
    const __m512 inverse = _mm512_set1_ps(127.0f / max);
    for (int i = 0; i < n_pad; i += 16) {
        const __mmask16 mask = i < n ? ggml_ext_mask16(n - i) : 0;
        const __m512i   c    = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), inverse));
        _mm_storeu_si128((__m128i *) (codes + i), _mm512_cvtsepi32_epi8(c));
    }
    return max / 127.0f;
}

// --- scales ---

TARGET bool ggml_ext_attention_levels_avx512(int n_groups, float n_levels, float * scale, float * unit,
                                             int8_t * negate) {
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

TARGET void ggml_ext_attention_pack_k_avx512(enum ggml_type type, const char * const * rows, int n_blocks,
                                             uint8_t * k) {
    const struct ggml_ext_attention_source s      = ggml_ext_attention_source_of(type);
    const __m512i                          offset = _mm512_set1_epi8((char) 0x80);
    const __m512i                          low    = _mm512_set1_epi8(15);
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

TARGET void ggml_ext_attention_pack_v_avx512(enum ggml_type type, const char * const * rows, int n_blocks,
                                             const int8_t * negate, int8_t * v) {
    const struct ggml_ext_attention_source s = ggml_ext_attention_source_of(type);
    const size_t                           d = (size_t) n_blocks * GROUP;
    // Byte 4 i + u of the result is code i of token u; from 32-byte rows in two registers, and from 16-byte rows in one.
    uint8_t                                from32[64], from16[64];
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

#endif  // GGML_EXT_X86
