// The decoding of queries and of tiles of K and V with AVX2.

#include "avx2.h"

#include <float.h>
#include <math.h>
#include <string.h>

#ifdef GGML_EXT_X86

// --- queries ---

// Eight values from i on, zeros beyond n.
EXPAND __m256 eight_of(int n, const float * x, int i) {
    float part[8] = { 0 };
    if (i + 8 <= n) {
        return _mm256_loadu_ps(x + i);
    }
    if (i < n) {
        memcpy(part, x + i, sizeof(float) * (n - i));
    }
    return _mm256_loadu_ps(part);
}

TARGET float ggml_ext_attention_quantize_avx2(int n, int n_pad, const float * x, int8_t * codes) {
    // Magnitudes order as integers, NaN above Inf.
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i       largest   = _mm256_setzero_si256();
    for (int i = 0; i < n; i += 8) {
        largest = _mm256_max_epi32(largest, _mm256_and_si256(_mm256_castps_si256(eight_of(n, x, i)), magnitude));
    }
    __m128i r = _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
    r         = _mm_max_epi32(r, _mm_shuffle_epi32(r, 0x4e));
    r         = _mm_max_epi32(r, _mm_shuffle_epi32(r, 0xb1));

    const float max = _mm_cvtss_f32(_mm_castsi128_ps(r));
    if (!isfinite(max) || !(127.0f / max <= FLT_MAX)) {
        memset(codes, 0, n_pad);
        return isfinite(max) ? 0.0f : NAN;
    }
    const __m256  inverse = _mm256_set1_ps(127.0f / max);
    const __m256i order   = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // undoes the packs' lanes
    for (int i = 0; i < n_pad; i += 32) {
        __m256i c[4];
#    pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            c[j] = _mm256_cvtps_epi32(_mm256_mul_ps(eight_of(n, x, i + 8 * j), inverse));
        }
        const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(c[0], c[1]), _mm256_packs_epi32(c[2], c[3]));
        _mm256_storeu_si256((__m256i *) (codes + i), _mm256_permutevar8x32_epi32(bytes, order));
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

TARGET void ggml_ext_attention_scales_avx2(int n_blocks, size_t block_size, const char * const * rows, float * out) {
    for (int t = 0; t < TILE; t += 8) {
        for (int g = 0; g < n_blocks; g++) {
            _mm256_store_ps(out + g * TILE + t, _mm256_cvtph_ps(eight_halves(rows + t, g * block_size)));
        }
    }
}

TARGET bool ggml_ext_attention_levels_avx2(int n_groups, float n_levels, float * scale, float * unit, int8_t * negate) {
    const __m256 sign     = _mm256_set1_ps(-0.0f);
    int          negative = 0;
    for (int g = 0; g < n_groups; g++, scale += TILE, negate += TILE) {
        __m256 largest = _mm256_setzero_ps();
        for (int t = 0; t < TILE; t += 8) {
            const __m256  x     = _mm256_load_ps(scale + t);
            const __m256i below = _mm256_castps_si256(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_LT_OQ));
            const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(below), _mm256_extracti128_si256(below, 1));
            _mm_storel_epi64((__m128i *) (negate + t), _mm_packs_epi16(words, words));
            negative |= _mm256_movemask_ps(_mm256_castsi256_ps(below));
            largest = _mm256_max_ps(largest, _mm256_andnot_ps(sign, x));
        }
        __m128 r = _mm_max_ps(_mm256_castps256_ps128(largest), _mm256_extractf128_ps(largest, 1));
        r        = _mm_max_ps(r, _mm_movehl_ps(r, r));
        r        = _mm_max_ss(r, _mm_movehdup_ps(r));

        const float  max     = _mm_cvtss_f32(r);
        const __m256 inverse = _mm256_set1_ps(max > 0.0f ? n_levels / max : 0.0f);
        unit[g]              = max / n_levels;
        for (int t = 0; t < TILE; t += 8) {
            _mm256_store_ps(scale + t, _mm256_mul_ps(_mm256_andnot_ps(sign, _mm256_load_ps(scale + t)), inverse));
        }
    }
    return negative != 0;
}

// --- codes ---

// The 32 codes of a block. Low nibbles come first.
EXPAND __m256i codes_of(bool nibbles, __m256i table, const char * block) {
    if (!nibbles) {
        return _mm256_loadu_si256((const __m256i *) block);
    }
    const __m128i x    = _mm_loadu_si128((const __m128i *) block);
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(x), _mm_srli_epi16(x, 4), 1);
    return _mm256_shuffle_epi8(table, _mm256_and_si256(both, _mm256_set1_epi8(15)));
}

// Row t of 8 dwords -> dword i of all 8 rows in x[i].
EXPAND void transpose8(__m256i x[8]) {
    __m256i     a[8], b[8];
#    pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        a[i]     = _mm256_unpacklo_epi32(x[i], x[i + 1]);
        a[i + 1] = _mm256_unpackhi_epi32(x[i], x[i + 1]);
    }
#    pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        b[i]     = _mm256_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
#    pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        x[i]     = _mm256_permute2x128_si256(b[i], b[i + 4], 0x20);
        x[i + 4] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x31);
    }
}

EXPAND void pack_k_of(const struct ggml_ext_attention_source * s, bool nibbles, const char * const * rows, int n_blocks,
                      uint8_t * k) {
    const __m256i offset = _mm256_set1_epi8((char) 0x80);
    const __m256i table  = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) s->table));
    for (int t = 0; t < TILE; t += 8) {
        for (int g = 0; g < n_blocks; g++) {
            __m256i x[8];
#    pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                x[i] = codes_of(nibbles, table, rows[t + i] + g * s->stride + s->offset);
            }
            transpose8(x);
            uint8_t * out = k + ((size_t) g * GROUP * TILE + t * 4);
#    pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                _mm256_store_si256((__m256i *) (out + i * TILE * 4), _mm256_xor_si256(x[i], offset));
            }
        }
    }
}

TARGET void ggml_ext_attention_pack_k_avx2(enum ggml_type type, const char * const * rows, int n_blocks, uint8_t * k) {
    const struct ggml_ext_attention_source s = ggml_ext_attention_source_of(type);
    if (s.nibbles) {
        pack_k_of(&s, true, rows, n_blocks, k);
    } else {
        pack_k_of(&s, false, rows, n_blocks, k);
    }
}

EXPAND void pack_v_of(const struct ggml_ext_attention_source * s, bool nibbles, const char * const * rows, int n_blocks,
                      const int8_t * negate, int8_t * v) {
    const size_t  d     = (size_t) n_blocks * GROUP;
    const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) s->table));
    for (int j = 0; j < TILE / 4; j++) {
        const int t = 16 * (j % 4) + 4 * (j / 4);
        for (int g = 0; g < n_blocks; g++) {
            __m256i x[4], y[4];
#    pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                x[i] = codes_of(nibbles, table, rows[t + i] + g * s->stride + s->offset);
            }
            const __m256i a = _mm256_unpacklo_epi8(x[0], x[1]);
            const __m256i b = _mm256_unpackhi_epi8(x[0], x[1]);
            const __m256i c = _mm256_unpacklo_epi8(x[2], x[3]);
            const __m256i e = _mm256_unpackhi_epi8(x[2], x[3]);
            y[0]            = _mm256_unpacklo_epi16(a, c);  // channels 0 .. 3 and 16 .. 19
            y[1]            = _mm256_unpackhi_epi16(a, c);  // 4 .. 7 and 20 .. 23
            y[2]            = _mm256_unpacklo_epi16(b, e);
            y[3]            = _mm256_unpackhi_epi16(b, e);
            if (negate) {
                int32_t signs;
                memcpy(&signs, negate + g * TILE + t, sizeof(signs));
                const __m256i sign = _mm256_set1_epi32(signs);
#    pragma GCC unroll 4
                for (int i = 0; i < 4; i++) {
                    y[i] = _mm256_sub_epi8(_mm256_xor_si256(y[i], sign), sign);
                }
            }
            __m256i * out = (__m256i *) (v + (j * d + g * GROUP) * 4);
            _mm256_store_si256(out, _mm256_permute2x128_si256(y[0], y[1], 0x20));
            _mm256_store_si256(out + 1, _mm256_permute2x128_si256(y[2], y[3], 0x20));
            _mm256_store_si256(out + 2, _mm256_permute2x128_si256(y[0], y[1], 0x31));
            _mm256_store_si256(out + 3, _mm256_permute2x128_si256(y[2], y[3], 0x31));
        }
    }
}

TARGET void ggml_ext_attention_pack_v_avx2(enum ggml_type type, const char * const * rows, int n_blocks,
                                           const int8_t * negate, int8_t * v) {
    const struct ggml_ext_attention_source s = ggml_ext_attention_source_of(type);
    if (s.nibbles) {
        pack_v_of(&s, true, rows, n_blocks, negate, v);
    } else {
        pack_v_of(&s, false, rows, n_blocks, negate, v);
    }
}

#endif  // GGML_EXT_X86
