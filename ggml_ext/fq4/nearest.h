// The encoder's search table, shared by everything that rounds to FQ4.

#ifndef GGML_EXT_FQ4_NEAREST_H
#define GGML_EXT_FQ4_NEAREST_H

#include <stdint.h>

// Cell c holds t = w / d with c / 2 - 128 <= t < (c + 1) / 2 - 128. The midpoint of two int8 is a multiple of
// 1 / 2, so inside a cell the nearest value is constant.
#define FQ4_N_CELLS 512

// Weights beyond this would need a d that fp16 cannot hold: 1.3 * 6e6 / 127 < 65504.
#define GGML_EXT_FQ4_MAX_WEIGHT 6e6f

// Nearest codes and their values, by cell and row of the table.
struct ggml_ext_fq4_nearest {
    _Alignas(64) float value[FQ4_N_CELLS][16];
    uint8_t code[FQ4_N_CELLS][16];
};

// The table, filled on the first call. Thread-safe.
const struct ggml_ext_fq4_nearest * ggml_ext_fq4_get_nearest(void);

// d as a block can hold it: the nearest fp16, at most the largest finite one.
float ggml_ext_fq4_round_d(float d);

#endif  // GGML_EXT_FQ4_NEAREST_H
