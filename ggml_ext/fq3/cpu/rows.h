// FQ3's table for look-ups in 16 bytes.

#ifndef GGML_EXT_FQ3_ROWS_CPU_H
#define GGML_EXT_FQ3_ROWS_CPU_H

#include <stdint.h>

// Every row twice: bit 3 of a code does not matter.
extern const int8_t ggml_ext_fq3_rows[16][16];

#endif  // GGML_EXT_FQ3_ROWS_CPU_H
