// FQ4_64 inside ggml-cpu: what its kernels take, see fq4/cpu/fq4.h.

#ifndef GGML_EXT_FQ4_64_CPU_H
#define GGML_EXT_FQ4_64_CPU_H

#include "fq4/cpu/fq4.h"
#include "fq4_64/fq4_64.h"

#ifdef __cplusplus
extern "C" {
#endif

// 64 activations, as struct ggml_ext_fq4_act has 256: a cache line of their own.
struct ggml_ext_fq4_64_act {
    alignas(64) int8_t q[QK_FQ4_64];
    float   d;
    int32_t start;
};

struct ggml_ext_fq4_64_tile {
    alignas(64) uint8_t w[GGML_EXT_FQ4_TILE_ROWS * QK_FQ4_64];
    float d[GGML_EXT_FQ4_TILE_ROWS];
};

GGML_API const struct ggml_ext_fq4_kind ggml_ext_fq4_64_kernels;

// The product of one row of n weights and one column of Q8_0, as a ggml_vec_dot_t for the type traits (nrc 1).
GGML_API void ggml_ext_fq4_64_dot(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by,
                                  int nrc);

#ifdef __cplusplus
}
#endif

#endif  // GGML_EXT_FQ4_64_CPU_H
