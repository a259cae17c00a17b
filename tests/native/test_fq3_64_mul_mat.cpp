// test_fq4_mul_mat.cpp for FQ3_64.

#define FQ4_REFERENCE_3
#define FQ4_REFERENCE_64
#define FQ4_BLOCK_H "fq3_64/cpu/block.h"
#include "test_fq4_mul_mat.cpp"
