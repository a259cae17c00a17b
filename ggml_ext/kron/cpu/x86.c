// The inner loops of GGML_EXT_OP_KRON for AVX-512 and AVX2.

#include "core/x86.h"

#include "kron.h"

#include <math.h>

#ifdef GGML_EXT_X86

// Matrix product. A tile of 8 rows by 2 vectors holds 16 accumulators, enough to hide the latency of
// the fused multiply-add, and needs 2 loads of b and 8 broadcasts of a for 16 of them. Its strip of b
// stays in the first-level cache while all rows pass by.

#    define TILE_ROWS 8
#    define TILE_VECS 2

// rows, vecs and f16 are constants where a tile is expanded.
#    define EXPAND static inline __attribute__((always_inline))

GGML_EXT_AVX512 EXPAND void tile_avx512(const struct ggml_ext_kron_product * p, int64_t row, int64_t col, int rows,
                                        int vecs, bool f16) {
    const int64_t a_row = p->a_row, a_depth = p->a_depth;
    const float * a    = p->a + row * a_row;
    const char *  b    = (const char *) p->b + col * (f16 ? 2 : 4);
    const int64_t step = p->b_row * (f16 ? 2 : 4);
    __mmask16     mask[TILE_VECS];
    __m512        acc[TILE_ROWS][TILE_VECS];
#    pragma GCC   unroll 2
    for (int v = 0; v < vecs; v++) {
        mask[v] = ggml_ext_mask16(p->cols - col - 16 * v);
    }
#    pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
#    pragma GCC unroll 2
        for (int v = 0; v < vecs; v++) {
            acc[r][v] = _mm512_setzero_ps();
        }
    }
    for (int64_t k = 0; k < p->depth; k++, a += a_depth, b += step) {
        __m512 bv[TILE_VECS];
#    pragma GCC unroll 2
        for (int v = 0; v < vecs; v++) {
            bv[v] = f16 ? _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask[v], (const uint16_t *) b + 16 * v)) :
                          _mm512_maskz_loadu_ps(mask[v], (const float *) b + 16 * v);
        }
#    pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const __m512 av = _mm512_set1_ps(a[r * a_row]);
#    pragma GCC unroll 2
            for (int v = 0; v < vecs; v++) {
                acc[r][v] = _mm512_fmadd_ps(av, bv[v], acc[r][v]);
            }
        }
    }
#    pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
#    pragma GCC unroll 2
        for (int v = 0; v < vecs; v++) {
            _mm512_mask_storeu_ps(p->c + (row + r) * p->c_row + col + 16 * v, mask[v], acc[r][v]);
        }
    }
}

GGML_EXT_AVX2 EXPAND void tile_avx2(const struct ggml_ext_kron_product * p, int64_t row, int64_t col, int rows,
                                    int vecs, bool f16) {
    const int64_t a_row = p->a_row, a_depth = p->a_depth;
    const float * a    = p->a + row * a_row;
    const char *  b    = (const char *) p->b + col * (f16 ? 2 : 4);
    const int64_t step = p->b_row * (f16 ? 2 : 4);
    __m256        acc[TILE_ROWS][TILE_VECS];
#    pragma GCC   unroll 8
    for (int r = 0; r < rows; r++) {
#    pragma GCC unroll 2
        for (int v = 0; v < vecs; v++) {
            acc[r][v] = _mm256_setzero_ps();
        }
    }
    for (int64_t k = 0; k < p->depth; k++, a += a_depth, b += step) {
        __m256 bv[TILE_VECS];
#    pragma GCC unroll 2
        for (int v = 0; v < vecs; v++) {
            bv[v] = f16 ? _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) ((const uint16_t *) b + 8 * v))) :
                          _mm256_loadu_ps((const float *) b + 8 * v);
            __asm__("" : "+x"(bv[v]));  // one load for all rows: GCC would load again in every multiply-add
        }
#    pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const __m256 av = _mm256_set1_ps(a[r * a_row]);
#    pragma GCC unroll 2
            for (int v = 0; v < vecs; v++) {
                acc[r][v] = _mm256_fmadd_ps(av, bv[v], acc[r][v]);
            }
        }
    }
#    pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
#    pragma GCC unroll 2
        for (int v = 0; v < vecs; v++) {
            _mm256_storeu_ps(p->c + (row + r) * p->c_row + col + 8 * v, acc[r][v]);
        }
    }
}

// All rows against one strip of columns.

GGML_EXT_AVX512 EXPAND void strip_avx512(const struct ggml_ext_kron_product * p, int64_t col, int vecs, bool f16) {
    int64_t row = 0;
    for (; row + 8 <= p->rows; row += 8) {
        tile_avx512(p, row, col, 8, vecs, f16);
    }
    for (; row + 4 <= p->rows; row += 4) {
        tile_avx512(p, row, col, 4, vecs, f16);
    }
    for (; row + 2 <= p->rows; row += 2) {
        tile_avx512(p, row, col, 2, vecs, f16);
    }
    for (; row < p->rows; row++) {
        tile_avx512(p, row, col, 1, vecs, f16);
    }
}

GGML_EXT_AVX2 EXPAND void strip_avx2(const struct ggml_ext_kron_product * p, int64_t col, int vecs, bool f16) {
    int64_t row = 0;
    for (; row + 4 <= p->rows; row += 4) {
        tile_avx2(p, row, col, 4, vecs, f16);
    }
    for (; row + 2 <= p->rows; row += 2) {
        tile_avx2(p, row, col, 2, vecs, f16);
    }
    for (; row < p->rows; row++) {
        tile_avx2(p, row, col, 1, vecs, f16);
    }
}

GGML_EXT_AVX512 static void kron_product_avx512(const struct ggml_ext_kron_product * p) {
    int64_t col = 0;
    for (; col + 16 < p->cols; col += 32) {
        p->b_f16 ? strip_avx512(p, col, 2, true) : strip_avx512(p, col, 2, false);
    }
    if (col < p->cols) {
        p->b_f16 ? strip_avx512(p, col, 1, true) : strip_avx512(p, col, 1, false);
    }
}

GGML_EXT_AVX2 static void kron_product_avx2(const struct ggml_ext_kron_product * p) {
    int64_t col = 0;
    for (; col + 16 <= p->cols; col += 16) {
        p->b_f16 ? strip_avx2(p, col, 2, true) : strip_avx2(p, col, 2, false);
    }
    for (; col + 8 <= p->cols; col += 8) {
        p->b_f16 ? strip_avx2(p, col, 1, true) : strip_avx2(p, col, 1, false);
    }
    if (col < p->cols) {
        struct ggml_ext_kron_product rest = *p;

        rest.cols = p->cols - col;
        rest.b    = (const char *) p->b + col * (p->b_f16 ? 2 : 4);
        rest.c    = p->c + col;
        ggml_ext_kron_generic.product(&rest);
    }
}

// Hadamard. Inside a vector a stage is x * (+1, -1) + partner: exact products, so the same bits as the
// plain butterfly. The last stage carries the norm.

GGML_EXT_AVX512 static inline __m512 kron_stage_avx512(__m512 x, __m512 partner, __mmask16 upper) {
    return _mm512_mask_sub_ps(_mm512_add_ps(partner, x), upper, partner, x);
}

GGML_EXT_AVX512 static void kron_hadamard_avx512(int64_t n, int64_t order, float * x) {
    const __m512  norm = _mm512_set1_ps(1.0f / sqrtf((float) order));
    const int64_t full = n - n % 16;
    for (int64_t i = 0; i < full; i += 16) {
        __m512 v = _mm512_loadu_ps(x + i);
        v        = kron_stage_avx512(v, _mm512_permute_ps(v, 0xb1), 0xaaaa);
        v        = order > 2 ? kron_stage_avx512(v, _mm512_permute_ps(v, 0x4e), 0xcccc) : v;
        v        = order > 4 ? kron_stage_avx512(v, _mm512_shuffle_f32x4(v, v, 0xb1), 0xf0f0) : v;
        v        = order > 8 ? kron_stage_avx512(v, _mm512_shuffle_f32x4(v, v, 0x4e), 0xff00) : v;
        _mm512_storeu_ps(x + i, order <= 16 ? _mm512_mul_ps(v, norm) : v);
    }
    for (int64_t half = 16; half < order; half *= 2) {
        const __m512 scale = 2 * half == order ? norm : _mm512_set1_ps(1.0f);
        for (int64_t i = 0; i < n; i += 2 * half) {
            for (int64_t j = i; j < i + half; j += 16) {
                const __m512 u = _mm512_loadu_ps(x + j);
                const __m512 v = _mm512_loadu_ps(x + j + half);
                _mm512_storeu_ps(x + j, _mm512_mul_ps(_mm512_add_ps(u, v), scale));
                _mm512_storeu_ps(x + j + half, _mm512_mul_ps(_mm512_sub_ps(u, v), scale));
            }
        }
    }
    if (full < n) {
        ggml_ext_kron_generic.hadamard(n - full, order, x + full);
    }
}

GGML_EXT_AVX2 static void kron_hadamard_avx2(int64_t n, int64_t order, float * x) {
    const __m256  norm = _mm256_set1_ps(1.0f / sqrtf((float) order));
    const __m256  odd  = _mm256_setr_ps(0.0f, -0.0f, 0.0f, -0.0f, 0.0f, -0.0f, 0.0f, -0.0f);
    const __m256  pair = _mm256_setr_ps(0.0f, 0.0f, -0.0f, -0.0f, 0.0f, 0.0f, -0.0f, -0.0f);
    const __m256  lane = _mm256_setr_ps(0.0f, 0.0f, 0.0f, 0.0f, -0.0f, -0.0f, -0.0f, -0.0f);
    const int64_t full = n - n % 8;
    for (int64_t i = 0; i < full; i += 8) {
        __m256 v = _mm256_loadu_ps(x + i);
        v        = _mm256_add_ps(_mm256_permute_ps(v, 0xb1), _mm256_xor_ps(v, odd));
        v        = order > 2 ? _mm256_add_ps(_mm256_permute_ps(v, 0x4e), _mm256_xor_ps(v, pair)) : v;
        v        = order > 4 ? _mm256_add_ps(_mm256_permute2f128_ps(v, v, 1), _mm256_xor_ps(v, lane)) : v;
        _mm256_storeu_ps(x + i, order <= 8 ? _mm256_mul_ps(v, norm) : v);
    }
    for (int64_t half = 8; half < order; half *= 2) {
        const __m256 scale = 2 * half == order ? norm : _mm256_set1_ps(1.0f);
        for (int64_t i = 0; i < n; i += 2 * half) {
            for (int64_t j = i; j < i + half; j += 8) {
                const __m256 u = _mm256_loadu_ps(x + j);
                const __m256 v = _mm256_loadu_ps(x + j + half);
                _mm256_storeu_ps(x + j, _mm256_mul_ps(_mm256_add_ps(u, v), scale));
                _mm256_storeu_ps(x + j + half, _mm256_mul_ps(_mm256_sub_ps(u, v), scale));
            }
        }
    }
    if (full < n) {
        ggml_ext_kron_generic.hadamard(n - full, order, x + full);
    }
}

// vminps and vmaxps give their second operand where one is NaN.

GGML_EXT_AVX512 static void kron_clamp_avx512(int64_t n, float limit, float * x) {
    const __m512 high = _mm512_set1_ps(limit);
    const __m512 low  = _mm512_set1_ps(-limit);
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 mask = ggml_ext_mask16(n - i);
        const __m512    v    = _mm512_maskz_loadu_ps(mask, x + i);
        _mm512_mask_storeu_ps(x + i, mask, _mm512_min_ps(high, _mm512_max_ps(low, v)));
    }
}

GGML_EXT_AVX2 static void kron_clamp_avx2(int64_t n, float limit, float * x) {
    const __m256 high = _mm256_set1_ps(limit);
    const __m256 low  = _mm256_set1_ps(-limit);
    int64_t      i    = 0;
    for (; i + 8 <= n; i += 8) {
        _mm256_storeu_ps(x + i, _mm256_min_ps(high, _mm256_max_ps(low, _mm256_loadu_ps(x + i))));
    }
    ggml_ext_kron_generic.clamp(n - i, limit, x + i);
}

const struct ggml_ext_kron_path ggml_ext_kron_avx512 = {
    "avx512",          ggml_ext_has_avx512, kron_product_avx512, kron_hadamard_avx512, ggml_ext_abs_max_avx512,
    kron_clamp_avx512,
};
const struct ggml_ext_kron_path ggml_ext_kron_avx2 = {
    "avx2", ggml_ext_has_avx2, kron_product_avx2, kron_hadamard_avx2, ggml_ext_abs_max_avx2, kron_clamp_avx2,
};

#endif  // GGML_EXT_X86
