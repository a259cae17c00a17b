// test_fq3.cpp for FQ3_64.

#define FQ4_REFERENCE_64
#include "test_fq3.cpp"
