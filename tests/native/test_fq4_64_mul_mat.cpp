// test_fq4_mul_mat.cpp for FQ4_64.

#define FQ4_REFERENCE_64
#include "test_fq4_mul_mat.cpp"
