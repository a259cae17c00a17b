// FQ4_64: FQ4's table on blocks of 64 weights in 35 bytes (4.375 bits per weight), for rows that are no multiple of 256.
// docs/gguf.md is the specification, docs/fq4_64.md holds the measurements behind it.
//
//     w = d * T[s][q]
//
// d is an 8-bit minifloat per block, s a 4-bit row index per sub-block of 16 weights, q a 4-bit code per weight, T FQ4's
// table (ggml_ext_fq4_table).

#ifndef GGML_EXT_FQ4_64_H
#define GGML_EXT_FQ4_64_H

#include "ggml.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define QK_FQ4_64 64  // weights per block; sub-blocks have 16

// Sub-block b (0..3) holds the weights 16 b .. 16 b + 15.
//   d: the scale ggml_ext_fq4_64_scales[d]: 0 is 0, 255 is NaN, else (1 + d % 8 / 8) 2^(d / 8 - 24).
//   s[b / 2]: row index of sub-block b, in the low nibble for even b, the high nibble for odd b.
//   q[j], j = 0..31: the code of weight j in the low nibble, that of weight 32 + j in the high one.
typedef struct {
    uint8_t d;
    uint8_t s[2];
    uint8_t q[QK_FQ4_64 / 2];
} ggml_ext_block_fq4_64;

GGML_API const float ggml_ext_fq4_64_scales[256];

// Rounds k floats (k a multiple of 64) to k / 64 blocks with the plain encoder. A block that holds a NaN, an Inf or a
// weight beyond 2e4 gets d = NaN.
GGML_API void ggml_ext_fq4_64_quantize_row(const float * x, void * y, int64_t k);

// The same for nrows rows, with the importance of each column (n_per_row values >= 0) or NULL. A block
// whose importances make the error overflow a float gets d = NaN too. Returns the bytes written.
GGML_API size_t ggml_ext_fq4_64_quantize(const float * src, void * dst, int64_t nrows, int64_t n_per_row,
                                         const float * imatrix);

GGML_API void ggml_ext_fq4_64_dequantize_row(const void * x, float * y, int64_t k);

// For ggml_validate_row_data: false, with a line in the log, if a block's d is NaN.
GGML_API bool ggml_ext_fq4_64_validate(const void * data, size_t n_blocks);

#ifdef __cplusplus
}
#endif

#endif  // GGML_EXT_FQ4_64_H
