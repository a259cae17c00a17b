// FQ3_64 reference: encoder, decoder. As in fq4.c every float operation is a single-precision one in the order written;
// the numpy version is python/ggml_ext/gguf/fq3_64.py.

#include "fq3_64.h"

#include "fq3/code.h"
#include "fq3/encode.h"
#include "fq3/fq3.h"
#include "fq4_64/fq4_64.h"
#include "fq4_64/scale.h"

#include <assert.h>
#include <string.h>

static_assert(sizeof(ggml_ext_block_fq3_64) == 27, "FQ3_64 blocks are packed");

static void pack(const struct ggml_ext_fq4_choice * choice, void * to) {
    ggml_ext_block_fq3_64 * block = to;
    memset(block, 0, sizeof(*block));
    block->d = ggml_ext_fq4_64_round_d(choice->d);
    ggml_ext_fq4_pack_rows(choice, QK_FQ3_64 / QK_FQ4_SUB, block->s);
    ggml_ext_fq3_pack_codes(choice, QK_FQ3_64, block->low, block->high);
}

static void refuse(void * block) {
    ((ggml_ext_block_fq3_64 *) block)->d = GGML_EXT_FQ4_64_NAN;
}

static const struct ggml_ext_fq4_encoder encoder = {
    &ggml_ext_fq3_nearest, QK_FQ3_64, sizeof(ggml_ext_block_fq3_64), ggml_ext_fq4_64_search, pack, refuse,
};

void ggml_ext_fq3_64_quantize_row(const float * x, void * y, int64_t k) {
    ggml_ext_fq3_64_quantize(x, y, 1, k, NULL);
}

size_t ggml_ext_fq3_64_quantize(const float * src, void * dst, int64_t nrows, int64_t n_per_row,
                                const float * imatrix) {
    return ggml_ext_fq4_encode_rows(&encoder, src, dst, nrows, n_per_row, imatrix);
}

void ggml_ext_fq3_64_dequantize_row(const void * x, float * y, int64_t k) {
    assert(k % QK_FQ3_64 == 0);
    const ggml_ext_block_fq3_64 * block = x;
    for (int64_t ib = 0; ib < k / QK_FQ3_64; ib++, block++, y += QK_FQ3_64) {
        const float d = ggml_ext_fq4_64_scales[block->d];
        for (int i = 0; i < QK_FQ3_64; i++) {
            const int row = block->s[i / 32] >> (4 * (i / 16 % 2)) & 15;
            y[i] = d * (float) ggml_ext_fq3_table[row][ggml_ext_fq3_code(block->low, block->high, QK_FQ3_64, i)];
        }
    }
}

bool ggml_ext_fq3_64_validate(const void * data, size_t n_blocks) {
    return ggml_ext_fq4_64_check(__func__, data, n_blocks, sizeof(ggml_ext_block_fq3_64));
}
