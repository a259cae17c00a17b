// FQ4 products for AVX2, chosen at run time: function attributes give the path its instructions, whatever flags the
// file is compiled with.
//
// Tile: w[256 r + i] is weight i of row r, as int8.

#include "fq4-paths-cpu.h"

#if defined(__x86_64__) && defined(__GNUC__)
#    include <immintrin.h>
#    include <string.h>

#    define FQ4_AVX2   __attribute__((target("avx2,fma,f16c")))
#    define FQ4_INLINE static inline __attribute__((always_inline))

typedef struct ggml_ext_fq4_act fq4_act;

static bool has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

static void quantize(int64_t k, const float * x, fq4_act * y) {
    ggml_ext_fq4_generic.quantize(k, x, y);
}

FQ4_AVX2 FQ4_INLINE __m128i table_row(const ggml_ext_block_fq4 * x, int sub_block) {
    return _mm_loadu_si128((const __m128i *) ggml_ext_fq4_table[x->s[sub_block / 2] >> (4 * (sub_block % 2)) & 15]);
}

// 32 weights of the sub-blocks b and b + 1, a table row per 128-bit lane.
FQ4_AVX2 FQ4_INLINE __m256i look_up(const ggml_ext_block_fq4 * x, int b, __m256i codes) {
    const __m256i rows = _mm256_inserti128_si256(_mm256_castsi128_si256(table_row(x, b)), table_row(x, b + 1), 1);
    return _mm256_shuffle_epi8(rows, codes);
}

// The weights of a block, 32 per register, in order.
FQ4_AVX2 FQ4_INLINE void decode_block(const ggml_ext_block_fq4 * x, __m256i w[8]) {
    const __m256i mask = _mm256_set1_epi8(15);
    for (int h = 0; h < 4; h++) {
        const int     i = 4 * (h / 2) + h % 2;
        const __m256i q = _mm256_loadu_si256((const __m256i *) (x->q + 32 * h));
        w[i]            = look_up(x, 2 * i, _mm256_and_si256(q, mask));
        w[i + 2]        = look_up(x, 2 * i + 4, _mm256_and_si256(_mm256_srli_epi16(q, 4), mask));
    }
}

// vpmaddubsw wants an unsigned operand: |w| with the sign moved to q; its pair sums stay below 2 * 127 * 127 < 2^15.
FQ4_AVX2 FQ4_INLINE __m256i madd(__m256i sum, __m256i w, const int8_t * q) {
    const __m256i q8    = _mm256_load_si256((const __m256i *) q);
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(q8, w));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

FQ4_AVX2 FQ4_INLINE float reduce(__m256 v) {
    __m128 r = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    r        = _mm_add_ps(r, _mm_movehl_ps(r, r));
    return _mm_cvtss_f32(_mm_add_ss(r, _mm_movehdup_ps(r)));
}

FQ4_AVX2 static void dots(int n_blocks, const void * vx, int n_cols, const fq4_act * const * y, float * out) {
    const ggml_ext_block_fq4 * x = vx;
    __m256                     acc[GGML_EXT_FQ4_MAX_COLS];
    for (int c = 0; c < n_cols; c++) {
        acc[c] = _mm256_setzero_ps();
    }
    for (int ib = 0; ib < n_blocks; ib++) {
        __m256i w[8];
        decode_block(x + ib, w);
        for (int c = 0; c < n_cols; c++) {
            __m256i sum = _mm256_setzero_si256();
            for (int i = 0; i < 8; i++) {
                sum = madd(sum, w[i], y[c][ib].q + 32 * i);
            }
            const __m256 d = _mm256_set1_ps(_cvtsh_ss(x[ib].d) * y[c][ib].d);
            acc[c]         = _mm256_fmadd_ps(d, _mm256_cvtepi32_ps(sum), acc[c]);
        }
    }
    for (int c = 0; c < n_cols; c++) {
        out[c] = reduce(acc[c]);
    }
}

FQ4_AVX2 static void decode(int n_rows, const void * x, size_t row_size, struct ggml_ext_fq4_tile * tile) {
    memset(tile->w + n_rows * QK_FQ4, 0, (GGML_EXT_FQ4_TILE_ROWS - n_rows) * QK_FQ4);
    memset(tile->d + n_rows, 0, (GGML_EXT_FQ4_TILE_ROWS - n_rows) * sizeof(float));
    for (int r = 0; r < n_rows; r++) {
        const ggml_ext_block_fq4 * block = (const void *) ((const char *) x + r * row_size);
        __m256i                    w[8];
        decode_block(block, w);
        for (int i = 0; i < 8; i++) {
            _mm256_store_si256((__m256i *) (tile->w + r * QK_FQ4 + 32 * i), w[i]);
        }
        tile->d[r] = _cvtsh_ss(block->d);
    }
}

FQ4_AVX2 static void multiply(const struct ggml_ext_fq4_tile * tile, int n_cols, const fq4_act * const * y,
                              float * acc) {
    for (int c = 0; c < n_cols; c++) {
        for (int r = 0; r < GGML_EXT_FQ4_TILE_ROWS; r++) {
            __m256i sum = _mm256_setzero_si256();
            for (int i = 0; i < 8; i++) {
                const __m256i w = _mm256_load_si256((const __m256i *) (tile->w + r * QK_FQ4 + 32 * i));
                sum             = madd(sum, w, y[c]->q + 32 * i);
            }
            acc[c * GGML_EXT_FQ4_TILE_ROWS + r] += tile->d[r] * y[c]->d * reduce(_mm256_cvtepi32_ps(sum));
        }
    }
}

const struct ggml_ext_fq4_path ggml_ext_fq4_avx2 = { "avx2", has_avx2, quantize, dots, decode, multiply };

#endif
