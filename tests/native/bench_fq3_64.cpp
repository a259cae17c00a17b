// bench_fq4.cpp for FQ3_64.

#define FQ4_TYPE    GGML_TYPE_FQ3_64
#define FQ4_BLOCK_H "fq3_64/cpu/block.h"
#include "bench_fq4.cpp"
