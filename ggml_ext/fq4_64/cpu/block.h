// FQ4_64's layout for the kernels' bodies in fq4/cpu.

#ifndef GGML_EXT_FQ4_64_BLOCK_CPU_H
#define GGML_EXT_FQ4_64_BLOCK_CPU_H

#include "fq4_64.h"

#define FQ4_QK QK_FQ4_64
#define FQ4_RUN \
    32  // consecutive weights whose codes are nibbles of consecutive bytes; the next ones are the high nibbles

// The scale of a block, whatever makes a float of fp16.
#define FQ4_SCALE(block, from_half) ggml_ext_fq4_64_scales[(block)->d]

// The code of weight i.
#define FQ4_CODE(block, i) ((block)->q[(i) % FQ4_RUN] >> 4 * ((i) / FQ4_RUN) & 15)

#define FQ4_TABLE ggml_ext_fq4_table
#define FQ4_ROWS  ggml_ext_fq4_table
#define FQ4_PAIRS ggml_ext_fq4_pairs

typedef ggml_ext_block_fq4_64       fq4_block;
typedef struct ggml_ext_fq4_64_act  fq4_act;
typedef struct ggml_ext_fq4_64_tile fq4_tile;

#endif  // GGML_EXT_FQ4_64_BLOCK_CPU_H
