// test_cuda_fq4_dequantize.cpp for FQ4_64.

#define FQ4_REFERENCE_64
#include "test_cuda_fq4_dequantize.cpp"
