// Upstream ops that ggml-ext computes on the CPU in place of upstream's code: products of FQ4 weights,
// attention over a quantised cache. They are taken through upstream's list of extra buffer types, which every
// op passes before the big switch of ggml_compute_forward (traits.cpp).

#ifndef GGML_EXT_OVERRIDE_CPU_H
#define GGML_EXT_OVERRIDE_CPU_H

#include "ggml-backend.h"

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

struct ggml_ext_cpu_override {
    // Whether we compute dst. Depends on the op's parameters, shapes and types and on the process's settings, not on
    // data: it is asked when a graph is planned, for the work size, and again when it is computed.
    bool (*applies)(const struct ggml_tensor * dst);
    size_t (*work_size)(const struct ggml_tensor * dst, int n_threads);  // bytes of params->wdata
    // Threads call it together (params->ith of params->nth, nth <= the n_threads of work_size).
    void (*compute)(const struct ggml_compute_params * params, struct ggml_tensor * dst);
};

// One per feature, in the feature's own file.
extern const struct ggml_ext_cpu_override ggml_ext_cpu_fq4_mul_mat;  // MUL_MAT and MUL_MAT_ID
extern const struct ggml_ext_cpu_override ggml_ext_cpu_attention;    // FLASH_ATTN_EXT

// The entry that upstream's list gets, after its own: weights in a repacked buffer stay with that buffer's code.
ggml_backend_buffer_type_t ggml_ext_cpu_buffer_type(void);

#ifdef __cplusplus
}
#endif

#endif  // GGML_EXT_OVERRIDE_CPU_H
