// GGML_EXT_OP_KRON inside ggml-cpu: the inner loops, one set per instruction set.

#ifndef GGML_EXT_KRON_CPU_H
#define GGML_EXT_KRON_CPU_H

#include "ggml.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// c[p][q] = sum over k < depth of a(p, k) b[k][q], for p < rows, q < cols, where
//   a(p, k) = a[p * a_row + k * a_depth], F32
//   b[k]    = b + k * b_row, F32 or F16
//   c[p]    = c + p * c_row, F32, apart from a and b.
// An element is one sum in ascending k, so its bits do not depend on how rows are split.
struct ggml_ext_kron_product {
    int64_t       rows, cols, depth;
    const float * a;
    int64_t       a_row, a_depth;
    const void *  b;
    bool          b_f16;
    int64_t       b_row;
    float *       c;
    int64_t       c_row;
};

struct ggml_ext_kron_path {
    const char * name;
    bool (*available)(void);
    void (*product)(const struct ggml_ext_kron_product * p);
    // n values in place, in pieces of order (a power of two, >= 2, that divides n), each times the
    // normalised Walsh-Hadamard matrix of that order.
    void (*hadamard)(int64_t n, int64_t order, float * x);
    float (*abs_max)(int64_t n, const float * x);      // of the values that are not NaN; 0 for none
    void (*clamp)(int64_t n, float limit, float * x);  // to +-limit, NaN stays
};

// Plain C, always available: the reference of the others. The x86 paths are in x86.c.
extern const struct ggml_ext_kron_path ggml_ext_kron_generic;
extern const struct ggml_ext_kron_path ggml_ext_kron_avx512;
extern const struct ggml_ext_kron_path ggml_ext_kron_avx2;

// Fastest first; the last entry is the generic path.
GGML_API const struct ggml_ext_kron_path * const ggml_ext_kron_paths[];
GGML_API const int                               ggml_ext_kron_n_paths;

#ifdef __cplusplus
}
#endif

#endif  // GGML_EXT_KRON_CPU_H
