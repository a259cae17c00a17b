// FQ3 reference: encoder, decoder. As in fq4.c every float operation is a single-precision one in the order written;
// the numpy version is python/ggml_ext/gguf/fq3.py.

#include "fq3.h"

#include "code.h"
#include "encode.h"
#include "ggml-impl.h"
#include "table.h"

#include <assert.h>
#include <math.h>
#include <string.h>

static_assert(sizeof(ggml_ext_block_fq3) == 106, "FQ3 blocks are packed");

#define SAME(t) t
#define ROW(s)  { GGML_EXT_FQ3_ROW_##s(SAME) }
const int8_t ggml_ext_fq3_table[16][8] = {
    ROW(0), ROW(1), ROW(2),  ROW(3),  ROW(4),  ROW(5),  ROW(6),  ROW(7),
    ROW(8), ROW(9), ROW(10), ROW(11), ROW(12), ROW(13), ROW(14), ROW(15),
};

struct ggml_ext_fq4_nearest ggml_ext_fq3_nearest = { .table = &ggml_ext_fq3_table[0][0], .n_codes = 8 };

void ggml_ext_fq3_pack_codes(const struct ggml_ext_fq4_choice * choice, int n, uint8_t * low, uint8_t * high) {
    for (int i = 0; i < n; i++) {
        const uint8_t code = ggml_ext_fq4_code(choice, i);
        low[i % (n / 4)] |= (uint8_t) ((code & 3) << 2 * (i / (n / 4)));
        high[i % (n / 8)] |= (uint8_t) (code >> 2 << i / (n / 8));
    }
}

static void pack(const struct ggml_ext_fq4_choice * choice, void * to) {
    ggml_ext_block_fq3 * block = to;
    memset(block, 0, sizeof(*block));
    block->d = GGML_FP32_TO_FP16(choice->d);
    ggml_ext_fq4_pack_rows(choice, QK_FQ3 / QK_FQ4_SUB, block->s);
    ggml_ext_fq3_pack_codes(choice, QK_FQ3, block->low, block->high);
}

static void refuse(void * block) {
    ((ggml_ext_block_fq3 *) block)->d = GGML_FP32_TO_FP16(NAN);
}

static const struct ggml_ext_fq4_encoder encoder = {
    &ggml_ext_fq3_nearest, QK_FQ3, sizeof(ggml_ext_block_fq3), ggml_ext_fq4_search, pack, refuse,
};

void ggml_ext_fq3_quantize_row(const float * x, void * y, int64_t k) {
    ggml_ext_fq3_quantize(x, y, 1, k, NULL);
}

size_t ggml_ext_fq3_quantize(const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix) {
    return ggml_ext_fq4_encode_rows(&encoder, src, dst, nrows, n_per_row, imatrix);
}

void ggml_ext_fq3_dequantize_row(const void * x, float * y, int64_t k) {
    assert(k % QK_FQ3 == 0);
    const ggml_ext_block_fq3 * block = x;
    for (int64_t ib = 0; ib < k / QK_FQ3; ib++, block++, y += QK_FQ3) {
        const float d = GGML_FP16_TO_FP32(block->d);
        for (int i = 0; i < QK_FQ3; i++) {
            const int row = block->s[i / 32] >> (4 * (i / 16 % 2)) & 15;
            y[i]          = d * (float) ggml_ext_fq3_table[row][ggml_ext_fq3_code(block->low, block->high, QK_FQ3, i)];
        }
    }
}
