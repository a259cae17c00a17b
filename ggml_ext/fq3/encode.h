// What the encoders of FQ3 and FQ3_64 share beside fq4/encode.h.

#ifndef GGML_EXT_FQ3_ENCODE_H
#define GGML_EXT_FQ3_ENCODE_H

#include "fq4/encode.h"

#include <stdint.h>

// Of FQ3's table.
extern struct ggml_ext_fq4_nearest ggml_ext_fq3_nearest;

// Adds the chosen codes of a block of n weights to its planes, which hold zeros.
void ggml_ext_fq3_pack_codes(const struct ggml_ext_fq4_choice * choice, int n, uint8_t * low, uint8_t * high);

#endif  // GGML_EXT_FQ3_ENCODE_H
