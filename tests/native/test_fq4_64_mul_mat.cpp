// test_fq4_mul_mat.cpp for FQ4_64.

#define FQ4_REFERENCE_64
#define FQ4_BLOCK_H "fq4_64/cpu/block.h"
#include "test_fq4_mul_mat.cpp"
