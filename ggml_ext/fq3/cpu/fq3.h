// FQ3 inside ggml-cpu: FQ4's kernels for its layout, see fq4/cpu/fq4.h. Activations and tiles are FQ4's.

#ifndef GGML_EXT_FQ3_CPU_H
#define GGML_EXT_FQ3_CPU_H

#include "fq3/fq3.h"
#include "fq4/cpu/fq4.h"

#ifdef __cplusplus
extern "C" {
#endif

GGML_API const struct ggml_ext_fq4_kind ggml_ext_fq3_kernels;

// ggml_ext_fq4_dot_q8_k as a ggml_vec_dot_t for the type traits (nrc 1).
GGML_API void ggml_ext_fq3_dot(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by,
                               int nrc);

#ifdef __cplusplus
}
#endif

#endif  // GGML_EXT_FQ3_CPU_H
