// Codes in two planes, of FQ3 and FQ3_64.

#ifndef GGML_EXT_FQ3_CODE_H
#define GGML_EXT_FQ3_CODE_H

#include <stdint.h>

// The code of weight i of a block of n weights.
static inline int ggml_ext_fq3_code(const uint8_t * low, const uint8_t * high, int n, int i) {
    return (low[i % (n / 4)] >> 2 * (i / (n / 4)) & 3) | (high[i % (n / 8)] >> i / (n / 8) & 1) << 2;
}

#endif  // GGML_EXT_FQ3_CODE_H
