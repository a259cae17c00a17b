// The search for table rows and codes, shared by the encoders of the types with FQ4's table. Every float operation is a
// single-precision one in the order written; encode's source is compiled without contraction.
//
// A block is n_subs sub-blocks of 16 weights, 16 n_subs weights in all.

#ifndef GGML_EXT_FQ4_ENCODE_H
#define GGML_EXT_FQ4_ENCODE_H

#include "fq4.h"

#include <stdbool.h>
#include <stdint.h>

// The best rows and cells that were found for a block. `cost` is the sum of weight * error^2; INFINITY before the first.
// Cell c holds t = w / d with c / 2 - 128 <= t < (c + 1) / 2 - 128: the midpoint of two int8 is a multiple of 1 / 2, so
// inside a cell the nearest value is constant.
struct ggml_ext_fq4_choice {
    float   d;
    float   cost;
    uint8_t row[QK_FQ4 / QK_FQ4_SUB];
    int16_t cell[QK_FQ4];
};

// Fills the search table on the first call. Thread-safe; before any of the functions below.
void ggml_ext_fq4_encode_init(void);

// The largest magnitude of n weights; false for a NaN or a weight beyond `limit`.
bool ggml_ext_fq4_largest(int n, const float * x, float limit, float * largest);

// The weights of the squared errors in a block of n weights: the importances with a floor; ones where there are none
// (NULL), or only zeros.
void ggml_ext_fq4_error_weights(int n, const float * importance, float * weight);

// Tries one d, which must be a value that the block can hold: keeps it if it beats the best so far. d = 0 is no
// candidate.
void ggml_ext_fq4_try(int n_subs, const float * x, const float * weight, float d, struct ggml_ext_fq4_choice * best);

// The d that minimises the weighted squared error for the chosen rows and codes; 0 if none does.
float ggml_ext_fq4_refit(int n_subs, const float * x, const float * weight, const struct ggml_ext_fq4_choice * choice);

// The chosen code of weight i.
uint8_t ggml_ext_fq4_code(const struct ggml_ext_fq4_choice * choice, int i);

#endif  // GGML_EXT_FQ4_ENCODE_H
