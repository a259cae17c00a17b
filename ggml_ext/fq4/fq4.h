// FQ4: 256 weights in 138 bytes (4.3125 bits per weight). docs/gguf.md is the specification,
// docs/fq4.md holds the measurements behind every constant.
//
//     w = d * T[s][q]
//
// d is one fp16 per block, s a 4-bit row index per sub-block of 16 weights, q a 4-bit code per
// weight, T a fixed 16 x 16 table of int8. After the look-up a block is 256 plain int8 values, so a
// dot product with int8 activations accumulates in int32 over the whole block.

#ifndef GGML_EXT_FQ4_H
#define GGML_EXT_FQ4_H

#include "ggml.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define QK_FQ4     256  // weights per block
#define QK_FQ4_SUB 16   // weights per sub-block

// Little endian. Sub-block b (0..15) holds the weights 16 b .. 16 b + 15.
//   s[b / 2]: row index of sub-block b, in the low nibble for even b, the high nibble for odd b.
//   q[64 h + j], h = 0..1, j = 0..63: the code of weight 128 h + j in the low nibble, that of
//   weight 128 h + 64 + j in the high one: 64 consecutive weights are one mask or one shift of 64
//   consecutive bytes.
typedef struct {
    ggml_fp16_t d;
    uint8_t     s[QK_FQ4 / QK_FQ4_SUB / 2];
    uint8_t     q[QK_FQ4 / 2];
} ggml_ext_block_fq4;

// T[s][q]; row 8 + r is row r mirrored and negated. Rows ascend.
GGML_API const int8_t ggml_ext_fq4_table[16][16];

// Rounds k floats (k a multiple of 256) to k / 256 blocks with the plain encoder. A block that
// holds a NaN, an Inf or a weight beyond 6e6 gets d = NaN, which ggml_validate_row_data reports.
GGML_API void ggml_ext_fq4_quantize_row(const float * x, void * y, int64_t k);

// The same for nrows rows, with the importance of each column (n_per_row values >= 0) or NULL. A block
// whose importances make the error overflow a float gets d = NaN too. Returns the bytes written.
GGML_API size_t ggml_ext_fq4_quantize(const float * src, void * dst, int64_t nrows, int64_t n_per_row,
                                      const float * imatrix);

GGML_API void ggml_ext_fq4_dequantize_row(const void * x, float * y, int64_t k);

#ifdef __cplusplus
}
#endif

#endif  // GGML_EXT_FQ4_H
