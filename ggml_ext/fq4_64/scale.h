// The scale of FQ4_64 and FQ3_64, shared by their encoders.

#ifndef GGML_EXT_FQ4_64_SCALE_H
#define GGML_EXT_FQ4_64_SCALE_H

#include "fq4/encode.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define GGML_EXT_FQ4_64_NAN     255
#define GGML_EXT_FQ4_64_LARGEST 254

// Weights beyond this would leave the encoders too few candidates: 1.4 * 2e4 / 127 < 224, the largest scale.
#define GGML_EXT_FQ4_64_MAX_WEIGHT 2e4f

// The byte of the nearest scale, ties to the even one, 254 for larger ones and for infinity; 0 for what is nearer to 0
// than to the smallest one, for numbers below 0 and NaN.
uint8_t ggml_ext_fq4_64_round_d(float d);

// The search of the encoders (struct ggml_ext_fq4_encoder) for blocks of 64 weights.
bool ggml_ext_fq4_64_search(const float * x, const float * weight, struct ggml_ext_fq4_choice * best);

// False, with a line in the log that begins with `name`, if the scale of a block is NaN: its first byte.
bool ggml_ext_fq4_64_check(const char * name, const void * data, size_t n_blocks, size_t block_size);

#endif  // GGML_EXT_FQ4_64_SCALE_H
