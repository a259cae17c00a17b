// Products for AVX-512 with VNNI: the body of all types, after a type's block.h.
//
// vpdpbusd multiplies unsigned with signed bytes: weights are decoded to T + 128, and a sum starts from the
// activations' `start`, which takes the surplus off.
//
// Tile: two groups of 16 rows. The 64 bytes at w[16 FQ4_QK g + 16 k], k = 0, 4, .. FQ4_QK - 4, hold the weights k .. k + 3 of row
// 16 g + l in lane l: one register times four activations, broadcast, adds to 16 rows.

#include "fq4/cpu/pairs.h"

#include <float.h>
#include <math.h>
#include <string.h>

#define FQ4_VNNI   GGML_EXT_AVX512_VNNI
#define FQ4_INLINE static inline __attribute__((always_inline))

// Bytes ahead, into the second-level cache: rows that follow each other are one stream from memory. docs/fq4.md has
// the measurement.
#define FQ4_PREFETCH 6144

FQ4_VNNI static void fq4_quantize(int64_t k, const float * x, void * acts) {
    fq4_act * y = acts;
    for (; k > 0; k -= FQ4_QK, x += FQ4_QK, y++) {
        // As integers, magnitudes keep their order and NaN is the largest.
        __m512i max = _mm512_setzero_si512();
        for (int i = 0; i < FQ4_QK; i += 16) {
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
        for (int j = 0; j < FQ4_QK; j += 16) {
            const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + j), scale));
            sum             = _mm512_add_epi32(sum, q);
            _mm_storeu_si128((__m128i *) (y->q + j), _mm512_cvtepi32_epi8(q));
        }
        y->d     = 1.0f / inv;
        y->start = -128 * _mm512_reduce_add_epi32(sum);
    }
}

FQ4_INLINE const fq4_act * fq4_act_at(const void * y, int ib) {
    return (const fq4_act *) y + ib;
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

FQ4_VNNI FQ4_INLINE void multiply_cols(const fq4_tile * tile, const int n_cols, const void * const * y, float * acc) {
    __m512i sum[GGML_EXT_FQ4_MAX_COLS][2];
#pragma GCC unroll 8
    for (int c = 0; c < n_cols; c++) {
        sum[c][0] = sum[c][1] = _mm512_set1_epi32(fq4_act_at(y[c], 0)->start);
    }
    for (int k = 0; k < FQ4_QK; k += 4) {
        const __m512i w0 = _mm512_load_si512(tile->w + 16 * k);
        const __m512i w1 = _mm512_load_si512(tile->w + 16 * FQ4_QK + 16 * k);
#pragma GCC unroll 8
        for (int c = 0; c < n_cols; c++) {
            int32_t four;
            memcpy(&four, fq4_act_at(y[c], 0)->q + k, sizeof(four));
            const __m512i q = _mm512_set1_epi32(four);
            sum[c][0]       = _mm512_dpbusd_epi32(sum[c][0], w0, q);
            sum[c][1]       = _mm512_dpbusd_epi32(sum[c][1], w1, q);
        }
    }
    const __m512 d0 = _mm512_load_ps(tile->d);
    const __m512 d1 = _mm512_load_ps(tile->d + 16);
#pragma GCC unroll 8
    for (int c = 0; c < n_cols; c++) {
        const __m512 d   = _mm512_set1_ps(fq4_act_at(y[c], 0)->d);
        float *      out = acc + c * GGML_EXT_FQ4_TILE_ROWS;
        _mm512_store_ps(out, _mm512_fmadd_ps(_mm512_mul_ps(d0, d), _mm512_cvtepi32_ps(sum[c][0]), _mm512_load_ps(out)));
        _mm512_store_ps(out + 16,
                        _mm512_fmadd_ps(_mm512_mul_ps(d1, d), _mm512_cvtepi32_ps(sum[c][1]), _mm512_load_ps(out + 16)));
    }
}

FQ4_VNNI static void fq4_multiply(const void * from, int n_cols, const void * const * y, float * acc) {
    const fq4_tile * tile = from;
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

// The table rows of four sub-blocks, whose indices are two bytes.
FQ4_VNNI FQ4_INLINE __m512i rows_of(const uint8_t * s) {
    const __m256i rows_01 = _mm256_load_si256((const __m256i *) FQ4_PAIRS[s[0]]);
    const __m256i rows_23 = _mm256_load_si256((const __m256i *) FQ4_PAIRS[s[1]]);
    return _mm512_inserti64x4(_mm512_castsi256_si512(rows_01), rows_23, 1);
}

#define FQ4_VECTORS (FQ4_QK / 64)

#ifdef FQ4_PLANES
#    include "fq3/cpu/avx512_planes.h"
#elif FQ4_QK == 64
// The codes of a block, one to a byte, in the low bits.
FQ4_VNNI FQ4_INLINE __m512i codes_of(const fq4_block * x) {
    const __m512i shift = _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4);
    return _mm512_srlv_epi64(_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *) x->q)), shift);
}
#else
// The codes of a block as nibbles: the low ones of vector h are FQ4_RUN / 64 vectors of weights in front of the high ones.
FQ4_VNNI FQ4_INLINE void nibbles_of(const fq4_block * x, __m512i q[FQ4_VECTORS / 2]) {
    for (int h = 0; h < FQ4_VECTORS / 2; h++) {
        q[h] = _mm512_loadu_si512(x->q + 64 * h);
        // Keeps the compiler from loading twice what nearly always crosses a cache line.
        __asm__("" : "+v"(q[h]));
    }
}
#endif

// The weights of a block as T + 128, 64 per register, in order: 16 weights share a table row, which one lane of
// vpshufb holds.
FQ4_VNNI FQ4_INLINE void decode_block(const fq4_block * x, __m512i w[FQ4_VECTORS]) {
    const __m512i mask = _mm512_set1_epi8(15);
#if FQ4_QK == 64
    w[0] = _mm512_shuffle_epi8(rows_of(x->s), _mm512_and_si512(codes_of(x), mask));
#else
    const int run = FQ4_RUN / 64;
    __m512i   q[FQ4_VECTORS / 2];
    nibbles_of(x, q);
    for (int h = 0; h < FQ4_VECTORS / 2; h++) {
        const int v = 2 * run * (h / run) + h % run;
        w[v]        = _mm512_shuffle_epi8(rows_of(x->s + 2 * v), _mm512_and_si512(q[h], mask));
        w[v + run] =
            _mm512_shuffle_epi8(rows_of(x->s + 2 * (v + run)), _mm512_and_si512(_mm512_srli_epi16(q[h], 4), mask));
    }
#endif
}

FQ4_VNNI FQ4_INLINE void dots_cols(int n_rows, int n_blocks, const void * rows, size_t row_size, const int n_cols,
                                   const void * const * y, float * const * out) {
    for (int r = 0; r < n_rows; r++) {
        const fq4_block * x = (const fq4_block *) ((const char *) rows + r * row_size);
        __m512            acc[GGML_EXT_FQ4_MAX_COLS];
#pragma GCC unroll 8
        for (int c = 0; c < n_cols; c++) {
            acc[c] = _mm512_setzero_ps();
        }
        for (int ib = 0; ib < n_blocks; ib++) {
            for (int line = 0; line < (int) sizeof(fq4_block); line += 64) {
                _mm_prefetch((const char *) (x + ib) + FQ4_PREFETCH + line, _MM_HINT_T1);
            }
            __m512i w[FQ4_VECTORS];
            decode_block(x + ib, w);
            const float d = FQ4_SCALE(x + ib, _cvtsh_ss);
#pragma GCC unroll 8
            for (int c = 0; c < n_cols; c++) {
                const fq4_act * act = fq4_act_at(y[c], ib);
                __m512i         sum = _mm512_zextsi128_si512(_mm_cvtsi32_si128(act->start));
                for (int i = 0; i < FQ4_VECTORS; i++) {
                    sum = _mm512_dpbusd_epi32(sum, w[i], _mm512_load_si512(act->q + 64 * i));
                }
                acc[c] = _mm512_fmadd_ps(_mm512_set1_ps(d * act->d), _mm512_cvtepi32_ps(sum), acc[c]);
            }
        }
#pragma GCC unroll 8
        for (int c = 0; c < n_cols; c++) {
            out[c][r] = _mm512_reduce_add_ps(acc[c]);
        }
    }
}

FQ4_VNNI static void fq4_dots(int n_rows, int n_blocks, const void * x, size_t row_size, int n_cols,
                              const void * const * y, float * const * out) {
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

FQ4_VNNI static void fq4_decode(int n_rows, const void * x, size_t row_size, void * to) {
    fq4_tile * tile = to;
    for (int first = 0; first < GGML_EXT_FQ4_TILE_ROWS; first += 16) {
        __m512i t[FQ4_VECTORS][16];
        for (int l = 0; l < 16; l++) {
            const int r = first + l;
            if (r < n_rows) {
                const fq4_block * block = (const void *) ((const char *) x + r * row_size);
                __m512i           w[FQ4_VECTORS];
                decode_block(block, w);
                for (int i = 0; i < FQ4_VECTORS; i++) {
                    t[i][l] = w[i];
                }
                tile->d[r] = FQ4_SCALE(block, _cvtsh_ss);
            } else {
                for (int i = 0; i < FQ4_VECTORS; i++) {
                    t[i][l] = _mm512_set1_epi8(-128);
                }
                tile->d[r] = 0.0f;
            }
        }
        for (int i = 0; i < FQ4_VECTORS; i++) {
            transpose(t[i]);
            for (int j = 0; j < 16; j++) {
                _mm512_store_si512(tile->w + FQ4_QK * first + 64 * (16 * i + j), t[i][j]);
            }
        }
    }
}
