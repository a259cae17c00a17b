// bench_fq4.cpp for FQ4_64.

#define FQ4_TYPE    GGML_TYPE_FQ4_64
#define FQ4_BLOCK_H "fq4_64/cpu/block.h"
#include "bench_fq4.cpp"
