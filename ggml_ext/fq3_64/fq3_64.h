// FQ3_64: FQ3's table on blocks of 64 weights in 27 bytes (3.375 bits per weight), for rows that are no multiple of 256.
// docs/gguf.md is the specification, docs/fq3.md holds the measurements behind it.
//
//     w = d * T[s][q]
//
// d is FQ4_64's 8-bit minifloat per block, s a 4-bit row index per sub-block of 16 weights, q a 3-bit code per weight, T
// FQ3's table (ggml_ext_fq3_table).

#ifndef GGML_EXT_FQ3_64_H
#define GGML_EXT_FQ3_64_H

#include "ggml.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define QK_FQ3_64 64  // weights per block; sub-blocks have 16

// Sub-block b (0..3) holds the weights 16 b .. 16 b + 15.
//   d: the scale ggml_ext_fq4_64_scales[d].
//   s[b / 2]: row index of sub-block b, in the low nibble for even b, the high nibble for odd b.
//   low[j], j = 0..15: in the bits 2 k and 2 k + 1, k = 0..3, the two low bits of the code of weight 16 k + j.
//   high[j], j = 0..7: in bit n, n = 0..7, the high bit of the code of weight 8 n + j.
typedef struct {
    uint8_t d;
    uint8_t s[QK_FQ3_64 / 32];
    uint8_t low[QK_FQ3_64 / 4];
    uint8_t high[QK_FQ3_64 / 8];
} ggml_ext_block_fq3_64;

// Rounds k floats (k a multiple of 64) to k / 64 blocks with the plain encoder. A block that holds a NaN, an Inf or a
// weight beyond 2e4 gets d = NaN.
GGML_API void ggml_ext_fq3_64_quantize_row(const float * x, void * y, int64_t k);

// The same for nrows rows, with the importance of each column (n_per_row values >= 0) or NULL. A block
// whose importances make the error overflow a float gets d = NaN too. Returns the bytes written.
GGML_API size_t ggml_ext_fq3_64_quantize(const float * src, void * dst, int64_t nrows, int64_t n_per_row,
                                         const float * imatrix);

GGML_API void ggml_ext_fq3_64_dequantize_row(const void * x, float * y, int64_t k);

// For ggml_validate_row_data: false, with a line in the log, if a block's d is NaN.
GGML_API bool ggml_ext_fq3_64_validate(const void * data, size_t n_blocks);

#ifdef __cplusplus
}
#endif

#endif  // GGML_EXT_FQ3_64_H
