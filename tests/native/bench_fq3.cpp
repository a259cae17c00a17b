// bench_fq4.cpp for FQ3.

#define FQ4_TYPE    GGML_TYPE_FQ3
#define FQ4_BLOCK_H "fq3/cpu/block.h"
#include "bench_fq4.cpp"
