// FQ3_64 inside ggml-cpu: FQ4's kernels for its layout, see fq4/cpu/fq4.h. Activations and tiles are FQ4_64's.

#ifndef GGML_EXT_FQ3_64_CPU_H
#define GGML_EXT_FQ3_64_CPU_H

#include "fq3_64/fq3_64.h"
#include "fq4_64/cpu/fq4_64.h"

#ifdef __cplusplus
extern "C" {
#endif

GGML_API const struct ggml_ext_fq4_kind ggml_ext_fq3_64_kernels;

// The product of one row of n weights and one column of Q8_0, as a ggml_vec_dot_t for the type traits (nrc 1).
GGML_API void ggml_ext_fq3_64_dot(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by,
                                  int nrc);

#ifdef __cplusplus
}
#endif

#endif  // GGML_EXT_FQ3_64_CPU_H
