// FQ3_64's layout for the kernels' bodies in fq4/cpu.

#ifndef GGML_EXT_FQ3_64_BLOCK_CPU_H
#define GGML_EXT_FQ3_64_BLOCK_CPU_H

#include "fq3/code.h"
#include "fq3/cpu/rows.h"
#include "fq3/fq3.h"
#include "fq3_64/fq3_64.h"
#include "fq4_64/cpu/fq4_64.h"

#define FQ4_QK QK_FQ3_64
#define FQ4_PLANES
#define FQ4_RUN 32

#define FQ4_SCALE(block, from_half) ggml_ext_fq4_64_scales[(block)->d]
#define FQ4_CODE(block, i)          ggml_ext_fq3_code((block)->low, (block)->high, QK_FQ3_64, i)

#define FQ4_TABLE ggml_ext_fq3_table
#define FQ4_ROWS  ggml_ext_fq3_rows
#define FQ4_PAIRS ggml_ext_fq3_pairs

typedef ggml_ext_block_fq3_64       fq4_block;
typedef struct ggml_ext_fq4_64_act  fq4_act;
typedef struct ggml_ext_fq4_64_tile fq4_tile;

#endif  // GGML_EXT_FQ3_64_BLOCK_CPU_H
