// FQ4 reference: encoder, decoder. Every float operation is a single-precision one in
// the order written (the file is compiled without contraction), so that all machines, and the numpy
// version in python/ggml_ext/gguf/fq4.py, give the same bytes.

#include "fq4.h"

#include "encode.h"
#include "ggml-impl.h"
#include "scale.h"
#include "table.h"

#include <assert.h>
#include <math.h>
#include <string.h>

static_assert(sizeof(ggml_ext_block_fq4) == 138, "FQ4 blocks are packed");

#define FQ4_SAME(t) t
#define FQ4_ROW(s)  { GGML_EXT_FQ4_ROW_##s(FQ4_SAME) }
const int8_t ggml_ext_fq4_table[16][16] = {
    FQ4_ROW(0), FQ4_ROW(1), FQ4_ROW(2),  FQ4_ROW(3),  FQ4_ROW(4),  FQ4_ROW(5),  FQ4_ROW(6),  FQ4_ROW(7),
    FQ4_ROW(8), FQ4_ROW(9), FQ4_ROW(10), FQ4_ROW(11), FQ4_ROW(12), FQ4_ROW(13), FQ4_ROW(14), FQ4_ROW(15),
};

// First guesses of d, as d = factor * absmax / 127. docs/fq4.md, "candidates".
static const float fq4_factors[] = { 0.90f, 0.95f, 1.00f, 1.05f, 1.10f, 1.15f, 1.20f, 1.25f, 1.30f };

#define FQ4_N_FACTORS ((int) (sizeof(fq4_factors) / sizeof(fq4_factors[0])))
#define FQ4_N_REFITS  2

float ggml_ext_fq4_round_d(float d) {
    const float fp16_max = 65504.0f;
    return GGML_FP16_TO_FP32(GGML_FP32_TO_FP16(d < fp16_max ? d : fp16_max));
}

static void fq4_pack(const struct ggml_ext_fq4_choice * choice, ggml_ext_block_fq4 * block) {
    block->d = GGML_FP32_TO_FP16(choice->d);
    for (int i = 0; i < 8; i++) {
        block->s[i] = (uint8_t) (choice->row[2 * i] | choice->row[2 * i + 1] << 4);
    }
    for (int h = 0; h < 2; h++) {
        for (int j = 0; j < 64; j++) {
            const int lo         = 128 * h + j;
            const int hi         = lo + 64;
            block->q[64 * h + j] = (uint8_t) (ggml_ext_fq4_code(choice, lo) | ggml_ext_fq4_code(choice, hi) << 4);
        }
    }
}

// fp16 may round d to 0, which is no candidate.
static void fq4_try(const float * x, const float * weight, float d, struct ggml_ext_fq4_choice * best) {
    ggml_ext_fq4_try(QK_FQ4 / 16, x, weight, ggml_ext_fq4_round_d(d), best);
}

// What ggml_validate_row_data reports.
static void fq4_refuse_block(ggml_ext_block_fq4 * block) {
    memset(block, 0, sizeof(*block));
    block->d = GGML_FP32_TO_FP16(NAN);
}

static void fq4_encode_block(const float * x, const float * weight, ggml_ext_block_fq4 * block) {
    float amax;
    if (!ggml_ext_fq4_largest(QK_FQ4, x, GGML_EXT_FQ4_MAX_WEIGHT, &amax)) {
        fq4_refuse_block(block);
        return;
    }

    struct ggml_ext_fq4_choice best = { 0 };
    best.cost                       = INFINITY;
    for (int k = 0; k < FQ4_N_FACTORS; k++) {
        fq4_try(x, weight, amax * (fq4_factors[k] / 127.0f), &best);
    }
    for (int k = 0; k < FQ4_N_REFITS; k++) {
        fq4_try(x, weight, ggml_ext_fq4_refit(QK_FQ4 / 16, x, weight, &best), &best);
    }
    // Weights too small for fp16 are zeros. Where there was a candidate, its cost overflowed: zeros would be wrong.
    if (best.d == 0.0f && ggml_ext_fq4_round_d(amax * (fq4_factors[FQ4_N_FACTORS - 1] / 127.0f)) > 0.0f) {
        fq4_refuse_block(block);
        return;
    }
    fq4_pack(&best, block);
}

void ggml_ext_fq4_quantize_row(const float * x, void * y, int64_t k) {
    ggml_ext_fq4_quantize(x, y, 1, k, NULL);
}

size_t ggml_ext_fq4_quantize(const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix) {
    assert(n_per_row % QK_FQ4 == 0);
    ggml_ext_fq4_encode_init();
    char * out = dst;
    for (int64_t row = 0; row < nrows; row++) {
        for (int64_t i = 0; i < n_per_row; i += QK_FQ4) {
            float weight[QK_FQ4];
            ggml_ext_fq4_error_weights(QK_FQ4, imatrix ? imatrix + i : NULL, weight);
            fq4_encode_block(src + row * n_per_row + i, weight, (ggml_ext_block_fq4 *) out);
            out += sizeof(ggml_ext_block_fq4);
        }
    }
    return (size_t) (out - (char *) dst);
}

void ggml_ext_fq4_dequantize_row(const void * x, float * y, int64_t k) {
    assert(k % QK_FQ4 == 0);
    const ggml_ext_block_fq4 * block = x;
    for (int64_t ib = 0; ib < k / QK_FQ4; ib++, block++, y += QK_FQ4) {
        const float d = GGML_FP16_TO_FP32(block->d);
        for (int i = 0; i < QK_FQ4; i++) {
            const int b    = i / 16;
            const int row  = block->s[b / 2] >> (4 * (b % 2)) & 15;
            const int code = block->q[64 * (i / 128) + i % 64] >> (4 * (i / 64 % 2)) & 15;
            y[i]           = d * (float) ggml_ext_fq4_table[row][code];
        }
    }
}
