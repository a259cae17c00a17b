// test_fq4_mul_mat.cpp for FQ3.

#define FQ4_REFERENCE_3
#define FQ4_BLOCK_H "fq3/cpu/block.h"
#include "test_fq4_mul_mat.cpp"
