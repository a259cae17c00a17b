// Products with 256-bit vectors: the body that AVX2 and AVX-VNNI share, of all types, after a type's block.h. The including
// file defines
//
//   FQ4_TARGET               function attributes
//   FQ4_OFFSET               what is added to a weight's byte: 0, or 128 to make it unsigned
//   fq4_mac(sum, w, y)       sum (8 x int32) + the products of 32 bytes w (with the offset) and 32 int8 y, four
//                            neighbours to a lane
//
// Row vectors: w[v] holds the weights 32 v .. 32 v + 31 of one block.
// Tile: 4 groups of 8 rows. In a group, vector k (0 .. FQ4_QK / 4 - 1) holds the weights 4 k .. 4 k + 3 of its rows, one row to a
// lane: a column's four activations are broadcast, and no sum crosses lanes.

#include "fq4/cpu/pairs.h"

#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <string.h>

#define FQ4_INLINE FQ4_TARGET static inline __attribute__((always_inline))

#define FQ4_VECTORS     (FQ4_QK / 32)  // of one row's block
#define FQ4_GROUP_BYTES (8 * FQ4_QK)   // of 8 rows' blocks

// Bytes ahead: rows that follow each other are one stream from memory. docs/fq4.md has the measurement.
#define FQ4_PREFETCH 4096

FQ4_INLINE const fq4_act * fq4_act_at(const void * y, int ib) {
    return (const fq4_act *) y + ib;
}

// The table rows of the sub-blocks 2 v and 2 v + 1, from the bytes of row indices.
FQ4_INLINE __m256i fq4_rows(uint64_t s, int v) {
    const __m256i rows = _mm256_load_si256((const __m256i *) FQ4_PAIRS[s >> 8 * v & 255]);
    return FQ4_OFFSET ? rows : _mm256_xor_si256(rows, _mm256_set1_epi8(-128));
}

#ifdef FQ4_PLANES
#    include "fq3/cpu/x86_256_planes.h"
#else
// The codes of a block as nibbles: the low ones of vector h are FQ4_RUN / 32 vectors of weights in front of the high ones.
FQ4_INLINE void fq4_nibbles(const fq4_block * x, __m256i q[FQ4_VECTORS / 2]) {
    for (int h = 0; h < FQ4_VECTORS / 2; h++) {
        q[h] = _mm256_loadu_si256((const __m256i *) (x->q + 32 * h));
        __asm__("" : "+x"(q[h]));  // or GCC loads it twice
    }
}

// What vpshufb takes of low nibbles.
FQ4_INLINE __m256i fq4_index(__m256i q) {
    return _mm256_and_si256(q, _mm256_set1_epi8(15));
}
#endif

// Loads are what bounds a dot product with one column, so the row indices come in one.
FQ4_INLINE void fq4_decode_row(const fq4_block * x, __m256i * w) {
    const int run = FQ4_RUN / 32;
    uint64_t  s   = 0;
    __m256i   q[FQ4_VECTORS / 2];
    memcpy(&s, x->s, sizeof(x->s));
    fq4_nibbles(x, q);
    for (int h = 0; h < FQ4_VECTORS / 2; h++) {
        const int v = 2 * run * (h / run) + h % run;
        w[v]        = _mm256_shuffle_epi8(fq4_rows(s, v), fq4_index(q[h]));
        w[v + run]  = _mm256_shuffle_epi8(fq4_rows(s, v + run), fq4_index(_mm256_srli_epi16(q[h], 4)));
    }
}

FQ4_INLINE float fq4_sum_lanes(__m256 x) {
    __m128 r = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    r        = _mm_add_ps(r, _mm_movehl_ps(r, r));
    return _mm_cvtss_f32(_mm_add_ss(r, _mm_movehdup_ps(r)));
}

FQ4_INLINE void fq4_dots_n(int n_rows, int n_blocks, const void * rows, size_t row_size, const int n_cols,
                           const void * const * y, float * const * out) {
    for (int r = 0; r < n_rows; r++) {
        const fq4_block * x = (const fq4_block *) ((const char *) rows + r * row_size);
        __m256            acc[GGML_EXT_FQ4_MAX_COLS];
#pragma GCC unroll 8
        for (int c = 0; c < n_cols; c++) {
            acc[c] = _mm256_setzero_ps();
        }
        for (int ib = 0; ib < n_blocks; ib++) {
            for (int line = 0; line < (int) sizeof(fq4_block); line += 64) {
                _mm_prefetch((const char *) (x + ib) + FQ4_PREFETCH + line, _MM_HINT_T0);
            }
            __m256i w[FQ4_VECTORS];
            __m256i sum[GGML_EXT_FQ4_MAX_COLS];
            fq4_decode_row(x + ib, w);
#pragma GCC unroll 8
            for (int c = 0; c < n_cols; c++) {
                sum[c] = _mm256_zextsi128_si256(_mm_cvtsi32_si128(FQ4_OFFSET ? fq4_act_at(y[c], ib)->start : 0));
            }
            for (int v = 0; v < FQ4_VECTORS; v++) {
#pragma GCC unroll 8
                for (int c = 0; c < n_cols; c++) {
                    sum[c] =
                        fq4_mac(sum[c], w[v], _mm256_load_si256((const __m256i *) (fq4_act_at(y[c], ib)->q + 32 * v)));
                }
            }
            const float d = FQ4_SCALE(x + ib, _cvtsh_ss);
#pragma GCC unroll 8
            for (int c = 0; c < n_cols; c++) {
                acc[c] =
                    _mm256_fmadd_ps(_mm256_set1_ps(d * fq4_act_at(y[c], ib)->d), _mm256_cvtepi32_ps(sum[c]), acc[c]);
            }
        }
#pragma GCC unroll 8
        for (int c = 0; c < n_cols; c++) {
            out[c][r] = fq4_sum_lanes(acc[c]);
        }
    }
}

FQ4_TARGET static void fq4_dots(int n_rows, int n_blocks, const void * x, size_t row_size, int n_cols,
                                const void * const * y, float * const * out) {
    switch (n_cols) {
        case 1:
            fq4_dots_n(n_rows, n_blocks, x, row_size, 1, y, out);
            break;
        case 2:
            fq4_dots_n(n_rows, n_blocks, x, row_size, 2, y, out);
            break;
        case 3:
            fq4_dots_n(n_rows, n_blocks, x, row_size, 3, y, out);
            break;
        case 4:
            fq4_dots_n(n_rows, n_blocks, x, row_size, 4, y, out);
            break;
        case 5:
            fq4_dots_n(n_rows, n_blocks, x, row_size, 5, y, out);
            break;
        case 6:
            fq4_dots_n(n_rows, n_blocks, x, row_size, 6, y, out);
            break;
        case 7:
            fq4_dots_n(n_rows, n_blocks, x, row_size, 7, y, out);
            break;
        case 8:
            fq4_dots_n(n_rows, n_blocks, x, row_size, 8, y, out);
            break;
    }
}

// in[r] holds 8 x 4 weights of row r; out[k] gets the k-th four of all rows.
FQ4_INLINE void fq4_transpose_8x8(const __m256i in[8], __m256i * out) {
    __m256i pairs[8], quads[8];
    for (int r = 0; r < 8; r += 2) {
        pairs[r]     = _mm256_unpacklo_epi32(in[r], in[r + 1]);  // fours 0, 1 (lanes' halves: 4, 5)
        pairs[r + 1] = _mm256_unpackhi_epi32(in[r], in[r + 1]);  // fours 2, 3 (6, 7)
    }
    for (int r = 0; r < 8; r += 4) {
        quads[r]     = _mm256_unpacklo_epi64(pairs[r], pairs[r + 2]);
        quads[r + 1] = _mm256_unpackhi_epi64(pairs[r], pairs[r + 2]);
        quads[r + 2] = _mm256_unpacklo_epi64(pairs[r + 1], pairs[r + 3]);
        quads[r + 3] = _mm256_unpackhi_epi64(pairs[r + 1], pairs[r + 3]);
    }
    for (int k = 0; k < 4; k++) {
        _mm256_store_si256(out + k, _mm256_permute2x128_si256(quads[k], quads[4 + k], 0x20));
        _mm256_store_si256(out + 4 + k, _mm256_permute2x128_si256(quads[k], quads[4 + k], 0x31));
    }
}

FQ4_TARGET static void fq4_decode(int n_rows, const void * x, size_t row_size, void * to) {
    fq4_tile * tile = (fq4_tile *) to;
    for (int group = 0; group < GGML_EXT_FQ4_TILE_ROWS / 8; group++) {
        __m256i   w[8][FQ4_VECTORS];
        __m256i * out = (__m256i *) (tile->w + group * FQ4_GROUP_BYTES);
        for (int r = 0; r < 8; r++) {
            const int row = 8 * group + r;
            if (row < n_rows) {
                const fq4_block * block = (const fq4_block *) ((const char *) x + row * row_size);
                fq4_decode_row(block, w[r]);
                tile->d[row] = FQ4_SCALE(block, _cvtsh_ss);
            } else {
                for (int v = 0; v < FQ4_VECTORS; v++) {
                    w[r][v] = _mm256_set1_epi8((char) FQ4_OFFSET);
                }
                tile->d[row] = 0.0f;
            }
        }
        for (int v = 0; v < FQ4_VECTORS; v++) {
            const __m256i rows[8] = { w[0][v], w[1][v], w[2][v], w[3][v], w[4][v], w[5][v], w[6][v], w[7][v] };
            fq4_transpose_8x8(rows, out + 8 * v);
        }
    }
}

// acc[8 rows] += d y_d sum.
FQ4_INLINE void fq4_add_scaled(__m256i sum, const float * d, float y_d, float * acc) {
    const __m256 scale = _mm256_mul_ps(_mm256_load_ps(d), _mm256_set1_ps(y_d));
    _mm256_store_ps(acc, _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(sum), _mm256_load_ps(acc)));
}

// 16 rows by up to 4 columns: 8 sums in registers, each weight loaded once for all columns.
FQ4_INLINE void fq4_multiply_n(const uint8_t * w, const float * d, const int n_cols, const void * const * y,
                               float * acc) {
    __m256i sum[2][4];
#pragma GCC unroll 8
    for (int c = 0; c < n_cols; c++) {
        sum[0][c] = sum[1][c] = _mm256_set1_epi32(FQ4_OFFSET ? fq4_act_at(y[c], 0)->start : 0);
    }
    for (int k = 0; k < FQ4_QK / 4; k++) {
        const __m256i w0 = _mm256_load_si256((const __m256i *) (w + 32 * k));
        const __m256i w1 = _mm256_load_si256((const __m256i *) (w + FQ4_GROUP_BYTES + 32 * k));
#pragma GCC unroll 8
        for (int c = 0; c < n_cols; c++) {
            int32_t four;
            memcpy(&four, fq4_act_at(y[c], 0)->q + 4 * k, 4);
            const __m256i q = _mm256_set1_epi32(four);
            sum[0][c]       = fq4_mac(sum[0][c], w0, q);
            sum[1][c]       = fq4_mac(sum[1][c], w1, q);
        }
    }
#pragma GCC unroll 8
    for (int c = 0; c < n_cols; c++) {
#pragma GCC unroll 8
        for (int half = 0; half < 2; half++) {
            fq4_add_scaled(sum[half][c], d + 8 * half, fq4_act_at(y[c], 0)->d,
                           acc + c * GGML_EXT_FQ4_TILE_ROWS + 8 * half);
        }
    }
}

FQ4_TARGET static void fq4_multiply(const void * from, int n_cols, const void * const * y, float * acc) {
    const fq4_tile * tile = (const fq4_tile *) from;
    for (; n_cols > 0; n_cols -= 4, y += 4, acc += 4 * GGML_EXT_FQ4_TILE_ROWS) {
        for (int row = 0; row < GGML_EXT_FQ4_TILE_ROWS; row += 16) {
            const uint8_t * w = tile->w + row * FQ4_QK;
            switch (n_cols) {
                case 1:
                    fq4_multiply_n(w, tile->d + row, 1, y, acc + row);
                    break;
                case 2:
                    fq4_multiply_n(w, tile->d + row, 2, y, acc + row);
                    break;
                case 3:
                    fq4_multiply_n(w, tile->d + row, 3, y, acc + row);
                    break;
                default:
                    fq4_multiply_n(w, tile->d + row, 4, y, acc + row);
                    break;
            }
        }
    }
}

// Magnitudes as integers order like the floats, with Inf and NaN above all numbers.
FQ4_INLINE int32_t fq4_max_bits(const float * x) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i       max       = _mm256_setzero_si256();
    for (int i = 0; i < FQ4_QK; i += 8) {
        max = _mm256_max_epi32(max, _mm256_and_si256(_mm256_loadu_si256((const __m256i *) (x + i)), magnitude));
    }
    __m128i r = _mm_max_epi32(_mm256_castsi256_si128(max), _mm256_extracti128_si256(max, 1));
    r         = _mm_max_epi32(r, _mm_shuffle_epi32(r, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(r, _mm_shuffle_epi32(r, 0xb1)));
}

FQ4_INLINE __m256i fq4_round_8(const float * x, __m256 inv) {
    return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), inv));
}

FQ4_TARGET static void fq4_quantize(int64_t k, const float * x, void * acts) {
    fq4_act *     y     = (fq4_act *) acts;
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // undoes what the packs do to the lanes
    const __m256i ones8 = _mm256_set1_epi8(1);
    const __m256i ones  = _mm256_set1_epi16(1);
    for (; k > 0; k -= FQ4_QK, x += FQ4_QK, y++) {
        const int32_t bits   = fq4_max_bits(x);
        const bool    finite = bits < 0x7f800000;
        float         max;
        memcpy(&max, &bits, 4);
        const float scale = 127.0f / max;
        y->start          = 0;
        if (!finite || !(scale <= FLT_MAX)) {  // numbers too small for a scale count as zeros
            y->d = finite ? 0.0f : NAN;
            memset(y->q, 0, sizeof(y->q));
            continue;
        }
        const __m256 inv = _mm256_set1_ps(scale);
        __m256i      sum = _mm256_setzero_si256();
        for (int i = 0; i < FQ4_QK; i += 32) {
            const __m256i low  = _mm256_packs_epi32(fq4_round_8(x + i, inv), fq4_round_8(x + i + 8, inv));
            const __m256i high = _mm256_packs_epi32(fq4_round_8(x + i + 16, inv), fq4_round_8(x + i + 24, inv));
            const __m256i q    = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
            _mm256_store_si256((__m256i *) (y->q + i), q);
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(ones8, q), ones));
        }
        __m128i r = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
        r         = _mm_add_epi32(r, _mm_shuffle_epi32(r, 0x4e));
        y->start  = -128 * _mm_cvtsi128_si32(_mm_add_epi32(r, _mm_shuffle_epi32(r, 0xb1)));
        y->d      = 1.0f / scale;
    }
}
