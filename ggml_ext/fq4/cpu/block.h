// FQ4's layout for the kernels' bodies.

#ifndef GGML_EXT_FQ4_BLOCK_CPU_H
#define GGML_EXT_FQ4_BLOCK_CPU_H

#include "fq4.h"

#define FQ4_QK QK_FQ4
#define FQ4_RUN \
    64  // consecutive weights whose codes are nibbles of consecutive bytes; the next ones are the high nibbles

// The scale of a block; from_half makes a float of fp16.
#define FQ4_SCALE(block, from_half) from_half((block)->d)

typedef ggml_ext_block_fq4       fq4_block;
typedef struct ggml_ext_fq4_act  fq4_act;
typedef struct ggml_ext_fq4_tile fq4_tile;

#endif  // GGML_EXT_FQ4_BLOCK_CPU_H
