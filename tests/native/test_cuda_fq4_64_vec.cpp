// test_cuda_fq4_vec.cpp for FQ4_64.

#define FQ4_REFERENCE_64
#include "test_cuda_fq4_vec.cpp"
