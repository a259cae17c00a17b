// FQ3's layout for the kernels' bodies in fq4/cpu.

#ifndef GGML_EXT_FQ3_BLOCK_CPU_H
#define GGML_EXT_FQ3_BLOCK_CPU_H

#include "fq3/code.h"
#include "fq3/fq3.h"
#include "fq4/cpu/fq4.h"
#include "rows.h"

#define FQ4_QK QK_FQ3
#define FQ4_PLANES   // codes in two planes, which *_planes.h make nibbles of
#define FQ4_RUN 128  // of those nibbles

#define FQ4_SCALE(block, from_half) from_half((block)->d)
#define FQ4_CODE(block, i)          ggml_ext_fq3_code((block)->low, (block)->high, QK_FQ3, i)

#define FQ4_TABLE ggml_ext_fq3_table
#define FQ4_ROWS  ggml_ext_fq3_rows
#define FQ4_PAIRS ggml_ext_fq3_pairs

typedef ggml_ext_block_fq3       fq4_block;
typedef struct ggml_ext_fq4_act  fq4_act;
typedef struct ggml_ext_fq4_tile fq4_tile;

#endif  // GGML_EXT_FQ3_BLOCK_CPU_H
