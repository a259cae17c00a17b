// FQ4 products for AVX-512 with VNNI.
//
// vpdpbusd multiplies unsigned with signed bytes: weights are decoded to T + 128, and a sum starts from the
// activations' `start`, which takes the surplus off.
//
// Tile: two groups of 16 rows. The 64 bytes at w[4096 g + 16 k], k = 0, 4, .. 252, hold the weights k .. k + 3 of row
// 16 g + l in lane l: one register times four activations, broadcast, adds to 16 rows.

#include "pairs.h"
#include "paths.h"

#ifdef GGML_EXT_X86
#    include <float.h>
#    include <math.h>
#    include <string.h>

#    define FQ4_VNNI   GGML_EXT_AVX512_VNNI
#    define FQ4_INLINE static inline __attribute__((always_inline))

// Bytes ahead, into the second-level cache: rows that follow each other are one stream from memory. docs/fq4.md has
// the measurement.
#    define FQ4_PREFETCH 6144

typedef struct ggml_ext_fq4_act fq4_act;

FQ4_VNNI static void fq4_quantize(int64_t k, const float * x, fq4_act * y) {
    const __m512i ones = _mm512_set1_epi8(1);
    for (; k > 0; k -= QK_FQ4, x += QK_FQ4, y++) {
        // As integers, magnitudes keep their order and NaN is the largest.
        __m512i max = _mm512_setzero_si512();
        for (int i = 0; i < QK_FQ4; i += 16) {
            const __m512i bits = _mm512_castps_si512(_mm512_loadu_ps(x + i));
            max                = _mm512_max_epi32(max, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
        }
        const int32_t max_bits = _mm512_reduce_max_epi32(max);
        float         largest;
        memcpy(&largest, &max_bits, sizeof(largest));
        const float inv = 127.0f / largest;
        if (max_bits >= 0x7f800000 || !(inv <= FLT_MAX)) {
            y->d     = max_bits >= 0x7f800000 ? NAN : 0.0f;
            y->start = 0;
            memset(y->q, 0, sizeof(y->q));
            continue;
        }
        const __m512 scale = _mm512_set1_ps(inv);
        __m512i      sum   = _mm512_setzero_si512();
        for (int i = 0; i < QK_FQ4; i += 64) {
            for (int j = i; j < i + 64; j += 16) {
                const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + j), scale));
                _mm_storeu_si128((__m128i *) (y->q + j), _mm512_cvtepi32_epi8(q));
            }
            sum = _mm512_dpbusd_epi32(sum, ones, _mm512_load_si512(y->q + i));
        }
        y->d     = 1.0f / inv;
        y->start = -128 * _mm512_reduce_add_epi32(sum);
    }
}

// Lane l of the 16 registers becomes register l: t[i] lane l = what was t[l] lane i.
FQ4_VNNI FQ4_INLINE void transpose(__m512i t[16]) {
    __m512i u[16];
    for (int i = 0; i < 16; i += 4) {
        const __m512i ab_lo = _mm512_unpacklo_epi32(t[i], t[i + 1]);
        const __m512i ab_hi = _mm512_unpackhi_epi32(t[i], t[i + 1]);
        const __m512i cd_lo = _mm512_unpacklo_epi32(t[i + 2], t[i + 3]);
        const __m512i cd_hi = _mm512_unpackhi_epi32(t[i + 2], t[i + 3]);
        u[i]                = _mm512_unpacklo_epi64(ab_lo, cd_lo);
        u[i + 1]            = _mm512_unpackhi_epi64(ab_lo, cd_lo);
        u[i + 2]            = _mm512_unpacklo_epi64(ab_hi, cd_hi);
        u[i + 3]            = _mm512_unpackhi_epi64(ab_hi, cd_hi);
    }
    // u[4 m + j], 128-bit lane n: rows 4 m .. 4 m + 3 of column 4 n + j.
    for (int j = 0; j < 4; j++) {
        const __m512i lo_02 = _mm512_shuffle_i32x4(u[j], u[4 + j], 0x88);
        const __m512i lo_13 = _mm512_shuffle_i32x4(u[j], u[4 + j], 0xdd);
        const __m512i hi_02 = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0x88);
        const __m512i hi_13 = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0xdd);
        t[j]                = _mm512_shuffle_i32x4(lo_02, hi_02, 0x88);
        t[8 + j]            = _mm512_shuffle_i32x4(lo_02, hi_02, 0xdd);
        t[4 + j]            = _mm512_shuffle_i32x4(lo_13, hi_13, 0x88);
        t[12 + j]           = _mm512_shuffle_i32x4(lo_13, hi_13, 0xdd);
    }
}

FQ4_VNNI FQ4_INLINE void multiply_cols(const struct ggml_ext_fq4_tile * tile, const int n_cols,
                                       const fq4_act * const * y, float * acc) {
    __m512i     sum[GGML_EXT_FQ4_MAX_COLS][2];
#    pragma GCC unroll 8
    for (int c = 0; c < n_cols; c++) {
        sum[c][0] = sum[c][1] = _mm512_set1_epi32(y[c]->start);
    }
    for (int k = 0; k < QK_FQ4; k += 4) {
        const __m512i w0 = _mm512_load_si512(tile->w + 16 * k);
        const __m512i w1 = _mm512_load_si512(tile->w + 16 * QK_FQ4 + 16 * k);
#    pragma GCC unroll 8
        for (int c = 0; c < n_cols; c++) {
            int32_t four;
            memcpy(&four, y[c]->q + k, sizeof(four));
            const __m512i q = _mm512_set1_epi32(four);
            sum[c][0]       = _mm512_dpbusd_epi32(sum[c][0], w0, q);
            sum[c][1]       = _mm512_dpbusd_epi32(sum[c][1], w1, q);
        }
    }
    const __m512 d0 = _mm512_load_ps(tile->d);
    const __m512 d1 = _mm512_load_ps(tile->d + 16);
#    pragma GCC  unroll 8
    for (int c = 0; c < n_cols; c++) {
        const __m512 d   = _mm512_set1_ps(y[c]->d);
        float *      out = acc + c * GGML_EXT_FQ4_TILE_ROWS;
        _mm512_store_ps(out, _mm512_fmadd_ps(_mm512_mul_ps(d0, d), _mm512_cvtepi32_ps(sum[c][0]), _mm512_load_ps(out)));
        _mm512_store_ps(out + 16,
                        _mm512_fmadd_ps(_mm512_mul_ps(d1, d), _mm512_cvtepi32_ps(sum[c][1]), _mm512_load_ps(out + 16)));
    }
}

FQ4_VNNI static void fq4_multiply(const struct ggml_ext_fq4_tile * tile, int n_cols, const fq4_act * const * y,
                                  float * acc) {
    switch (n_cols) {
        case 1:
            multiply_cols(tile, 1, y, acc);
            return;
        case 2:
            multiply_cols(tile, 2, y, acc);
            return;
        case 3:
            multiply_cols(tile, 3, y, acc);
            return;
        case 4:
            multiply_cols(tile, 4, y, acc);
            return;
        case 5:
            multiply_cols(tile, 5, y, acc);
            return;
        case 6:
            multiply_cols(tile, 6, y, acc);
            return;
        case 7:
            multiply_cols(tile, 7, y, acc);
            return;
        default:
            multiply_cols(tile, 8, y, acc);
            return;
    }
}

// The 256 weights of a block as T + 128, 64 per register, in order: 16 weights share a table row, which one lane of
// vpshufb holds.
FQ4_VNNI FQ4_INLINE void decode_block(const ggml_ext_block_fq4 * x, __m512i w[4]) {
    const __m512i mask = _mm512_set1_epi8(15);
    for (int h = 0; h < 2; h++) {
        __m512i q = _mm512_loadu_si512(x->q + 64 * h);
        // Keeps the compiler from loading twice what nearly always crosses a cache line.
        __asm__("" : "+v"(q));
        const __m512i codes[2] = { _mm512_and_si512(q, mask), _mm512_and_si512(_mm512_srli_epi16(q, 4), mask) };
        for (int i = 2 * h; i < 2 * h + 2; i++) {
            const __m256i rows_01 = _mm256_load_si256((const __m256i *) ggml_ext_fq4_pairs[x->s[2 * i]]);
            const __m256i rows_23 = _mm256_load_si256((const __m256i *) ggml_ext_fq4_pairs[x->s[2 * i + 1]]);
            const __m512i rows    = _mm512_inserti64x4(_mm512_castsi256_si512(rows_01), rows_23, 1);
            w[i]                  = _mm512_shuffle_epi8(rows, codes[i % 2]);
        }
    }
}

FQ4_VNNI FQ4_INLINE void dots_cols(int n_rows, int n_blocks, const void * rows, size_t row_size, const int n_cols,
                                   const fq4_act * const * y, float * const * out) {
    for (int r = 0; r < n_rows; r++) {
        const ggml_ext_block_fq4 * x = (const ggml_ext_block_fq4 *) ((const char *) rows + r * row_size);
        __m512                     acc[GGML_EXT_FQ4_MAX_COLS];
#    pragma GCC unroll 8
        for (int c = 0; c < n_cols; c++) {
            acc[c] = _mm512_setzero_ps();
        }
        for (int ib = 0; ib < n_blocks; ib++) {
            for (int line = 0; line < 192; line += 64) {
                _mm_prefetch((const char *) (x + ib) + FQ4_PREFETCH + line, _MM_HINT_T1);
            }
            __m512i w[4];
            decode_block(x + ib, w);
            const float d = _cvtsh_ss(x[ib].d);
#    pragma GCC unroll 8
            for (int c = 0; c < n_cols; c++) {
                const fq4_act * act = y[c] + ib;
                __m512i         sum = _mm512_zextsi128_si512(_mm_cvtsi32_si128(act->start));
                for (int i = 0; i < 4; i++) {
                    sum = _mm512_dpbusd_epi32(sum, w[i], _mm512_load_si512(act->q + 64 * i));
                }
                acc[c] = _mm512_fmadd_ps(_mm512_set1_ps(d * act->d), _mm512_cvtepi32_ps(sum), acc[c]);
            }
        }
#    pragma GCC unroll 8
        for (int c = 0; c < n_cols; c++) {
            out[c][r] = _mm512_reduce_add_ps(acc[c]);
        }
    }
}

FQ4_VNNI static void fq4_dots(int n_rows, int n_blocks, const void * x, size_t row_size, int n_cols,
                              const fq4_act * const * y, float * const * out) {
    switch (n_cols) {
        case 1:
            dots_cols(n_rows, n_blocks, x, row_size, 1, y, out);
            return;
        case 2:
            dots_cols(n_rows, n_blocks, x, row_size, 2, y, out);
            return;
        case 3:
            dots_cols(n_rows, n_blocks, x, row_size, 3, y, out);
            return;
        case 4:
            dots_cols(n_rows, n_blocks, x, row_size, 4, y, out);
            return;
        case 5:
            dots_cols(n_rows, n_blocks, x, row_size, 5, y, out);
            return;
        case 6:
            dots_cols(n_rows, n_blocks, x, row_size, 6, y, out);
            return;
        case 7:
            dots_cols(n_rows, n_blocks, x, row_size, 7, y, out);
            return;
        default:
            dots_cols(n_rows, n_blocks, x, row_size, 8, y, out);
            return;
    }
}

FQ4_VNNI static void fq4_decode(int n_rows, const void * x, size_t row_size, struct ggml_ext_fq4_tile * tile) {
    for (int first = 0; first < GGML_EXT_FQ4_TILE_ROWS; first += 16) {
        __m512i t[4][16];
        for (int l = 0; l < 16; l++) {
            const int r = first + l;
            if (r < n_rows) {
                const ggml_ext_block_fq4 * block = (const void *) ((const char *) x + r * row_size);
                __m512i                    w[4];
                decode_block(block, w);
                for (int i = 0; i < 4; i++) {
                    t[i][l] = w[i];
                }
                tile->d[r] = _cvtsh_ss(block->d);
            } else {
                for (int i = 0; i < 4; i++) {
                    t[i][l] = _mm512_set1_epi8(-128);
                }
                tile->d[r] = 0.0f;
            }
        }
        for (int i = 0; i < 4; i++) {
            transpose(t[i]);
            for (int j = 0; j < 16; j++) {
                _mm512_store_si512(tile->w + QK_FQ4 * first + 64 * (16 * i + j), t[i][j]);
            }
        }
    }
}

const struct ggml_ext_fq4_path ggml_ext_fq4_avx512_vnni = { "avx512-vnni", ggml_ext_has_avx512_vnni,
                                                            fq4_quantize,  fq4_dots,
                                                            fq4_decode,    fq4_multiply };

#endif
