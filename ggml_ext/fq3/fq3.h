// FQ3: 256 weights in 106 bytes (3.3125 bits per weight). docs/gguf.md is the specification,
// docs/fq3.md holds the measurements behind every constant.
//
//     w = d * T[s][q]
//
// d is one fp16 per block, s a 4-bit row index per sub-block of 16 weights, q a 3-bit code per weight, T a fixed 16 x 8
// table of int8: FQ4 with half as many values in a row.

#ifndef GGML_EXT_FQ3_H
#define GGML_EXT_FQ3_H

#include "ggml.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define QK_FQ3 256  // weights per block; sub-blocks have 16

// Little endian. Sub-block b (0..15) holds the weights 16 b .. 16 b + 15.
//   s[b / 2]: row index of sub-block b, in the low nibble for even b, the high nibble for odd b.
//   low[j], j = 0..63: in the bits 2 k and 2 k + 1, k = 0..3, the two low bits of the code of weight 64 k + j.
//   high[j], j = 0..31: in bit n, n = 0..7, the high bit of the code of weight 32 n + j.
// So 64 consecutive weights are one shift of 64 consecutive bytes, and the codes of the weights j and 128 + j are two
// nibbles once the high bits are shifted by 2, 1, 0 or -1: bits 2 k and 2 k + 4 lie as they lie in a byte of two codes.
typedef struct {
    ggml_fp16_t d;
    uint8_t     s[QK_FQ3 / 32];
    uint8_t     low[QK_FQ3 / 4];
    uint8_t     high[QK_FQ3 / 8];
} ggml_ext_block_fq3;

// T[s][q]; row 8 + r is row r mirrored and negated. Rows ascend.
GGML_API const int8_t ggml_ext_fq3_table[16][8];

// Rounds k floats (k a multiple of 256) to k / 256 blocks with the plain encoder. A block that
// holds a NaN, an Inf or a weight beyond 6e6 gets d = NaN, which ggml_validate_row_data reports.
GGML_API void ggml_ext_fq3_quantize_row(const float * x, void * y, int64_t k);

// The same for nrows rows, with the importance of each column (n_per_row values >= 0) or NULL. A block
// whose importances make the error overflow a float gets d = NaN too. Returns the bytes written.
GGML_API size_t ggml_ext_fq3_quantize(const float * src, void * dst, int64_t nrows, int64_t n_per_row,
                                      const float * imatrix);

GGML_API void ggml_ext_fq3_dequantize_row(const void * x, float * y, int64_t k);

#ifdef __cplusplus
}
#endif

#endif  // GGML_EXT_FQ3_H
