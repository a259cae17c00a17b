// FQ4's layout for the kernels' bodies.

#ifndef GGML_EXT_FQ4_BLOCK_CPU_H
#define GGML_EXT_FQ4_BLOCK_CPU_H

#include "fq4.h"

#define FQ4_QK QK_FQ4
#define FQ4_RUN \
    64  // consecutive weights whose codes are nibbles of consecutive bytes; the next ones are the high nibbles

// The scale of a block; from_half makes a float of fp16.
#define FQ4_SCALE(block, from_half) from_half((block)->d)

// The code of weight i.
#define FQ4_CODE(block, i) ((block)->q[FQ4_RUN * ((i) / (2 * FQ4_RUN)) + (i) % FQ4_RUN] >> 4 * ((i) / FQ4_RUN % 2) & 15)

#define FQ4_TABLE ggml_ext_fq4_table
#define FQ4_ROWS  ggml_ext_fq4_table  // 16 bytes of a row of the table
#define FQ4_PAIRS ggml_ext_fq4_pairs  // pairs.h

typedef ggml_ext_block_fq4       fq4_block;
typedef struct ggml_ext_fq4_act  fq4_act;
typedef struct ggml_ext_fq4_tile fq4_tile;

#endif  // GGML_EXT_FQ4_BLOCK_CPU_H
