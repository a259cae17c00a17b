// GGML_EXT_OP_KRON: what constructor and backends share.

#ifndef GGML_EXT_KRON_H
#define GGML_EXT_KRON_H

#include <stdint.h>

// op_params from [1] on; src: x, left or NULL, right or NULL.
struct ggml_ext_kron_params {
    int32_t hadamard;
    float   clip;
};

#endif  // GGML_EXT_KRON_H
