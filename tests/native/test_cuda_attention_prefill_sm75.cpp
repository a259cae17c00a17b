// The same test on the paths of sm_75: products as four instructions, Q from memory in every step.

#define GGML_EXT_CUDA_ARCH 750

#include "test_cuda_attention_prefill.cpp"
