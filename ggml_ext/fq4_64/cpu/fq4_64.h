// FQ4_64 inside ggml-cpu.

#ifndef GGML_EXT_FQ4_64_CPU_H
#define GGML_EXT_FQ4_64_CPU_H

#include "fq4_64/fq4_64.h"

#ifdef __cplusplus
extern "C" {
#endif

// The product of one row of n weights and one column of Q8_0, as a ggml_vec_dot_t for the type traits (nrc 1).
GGML_API void ggml_ext_fq4_64_dot(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by,
                                  int nrc);

#ifdef __cplusplus
}
#endif

#endif  // GGML_EXT_FQ4_64_CPU_H
