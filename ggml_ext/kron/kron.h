// GGML_EXT_OP_KRON: what constructor and backends share.

#ifndef GGML_EXT_KRON_H
#define GGML_EXT_KRON_H

#include "ggml.h"

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// op_params from [1] on; src: x, left or NULL, right or NULL.
struct ggml_ext_kron_params {
    int32_t hadamard;
    float   clip;
    int32_t unobserved;  // 0 or 1
};

// Declares that nothing outside the graph reads the result of ggml_ext_kron, no evaluation callback either: a backend that
// knows how the graph's nodes read it may leave the F32 values unwritten.
GGML_API void ggml_ext_kron_set_unobserved(struct ggml_tensor * kron);

#ifdef __cplusplus
}
#endif

#endif  // GGML_EXT_KRON_H
