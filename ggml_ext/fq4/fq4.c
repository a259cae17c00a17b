// FQ4 reference: encoder, decoder. Every float operation is a single-precision one in
// the order written (the file is compiled without contraction), so that all machines, and the numpy
// version in python/ggml_ext/gguf/fq4.py, give the same bytes.

#include "fq4.h"

#include "encode.h"
#include "ggml-impl.h"
#include "table.h"

#include <assert.h>
#include <math.h>

static_assert(sizeof(ggml_ext_block_fq4) == 138, "FQ4 blocks are packed");

#define FQ4_SAME(t) t
#define FQ4_ROW(s)  { GGML_EXT_FQ4_ROW_##s(FQ4_SAME) }
const int8_t ggml_ext_fq4_table[16][16] = {
    FQ4_ROW(0), FQ4_ROW(1), FQ4_ROW(2),  FQ4_ROW(3),  FQ4_ROW(4),  FQ4_ROW(5),  FQ4_ROW(6),  FQ4_ROW(7),
    FQ4_ROW(8), FQ4_ROW(9), FQ4_ROW(10), FQ4_ROW(11), FQ4_ROW(12), FQ4_ROW(13), FQ4_ROW(14), FQ4_ROW(15),
};

static void fq4_pack(const struct ggml_ext_fq4_choice * choice, void * to) {
    ggml_ext_block_fq4 * block = to;
    block->d                   = GGML_FP32_TO_FP16(choice->d);
    ggml_ext_fq4_pack_rows(choice, QK_FQ4 / QK_FQ4_SUB, block->s);
    for (int h = 0; h < 2; h++) {
        for (int j = 0; j < 64; j++) {
            const int lo         = 128 * h + j;
            const int hi         = lo + 64;
            block->q[64 * h + j] = (uint8_t) (ggml_ext_fq4_code(choice, lo) | ggml_ext_fq4_code(choice, hi) << 4);
        }
    }
}

static void fq4_refuse(void * block) {
    ((ggml_ext_block_fq4 *) block)->d = GGML_FP32_TO_FP16(NAN);
}

static const struct ggml_ext_fq4_encoder fq4_encoder = {
    &ggml_ext_fq4_nearest, QK_FQ4, sizeof(ggml_ext_block_fq4), ggml_ext_fq4_search, fq4_pack, fq4_refuse,
};

void ggml_ext_fq4_quantize_row(const float * x, void * y, int64_t k) {
    ggml_ext_fq4_quantize(x, y, 1, k, NULL);
}

size_t ggml_ext_fq4_quantize(const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix) {
    return ggml_ext_fq4_encode_rows(&fq4_encoder, src, dst, nrows, n_per_row, imatrix);
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
