// FQ4 inside ggml-cpu: the dot-product paths and the choice between them.

#ifndef GGML_EXT_FQ4_CPU_H
#define GGML_EXT_FQ4_CPU_H

#include "fq4.h"

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

// Blocks of x with as many Q8_K blocks of y.
typedef float (*ggml_ext_fq4_dot_fn)(int n_blocks, const void * x, const void * y);

struct ggml_ext_fq4_path {
    const char * name;
    bool (*available)(void);
    ggml_ext_fq4_dot_fn dot;
};

// Fastest first; the last entry is the generic path, which is always available.
GGML_API const struct ggml_ext_fq4_path ggml_ext_fq4_paths[];
GGML_API const int                      ggml_ext_fq4_n_paths;

// The fastest available path, as a ggml_vec_dot_t for the type traits: n weights, one row (nrc 1).
GGML_API void ggml_ext_fq4_dot(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by,
                               int nrc);

#ifdef __cplusplus
}
#endif

#endif  // GGML_EXT_FQ4_CPU_H
