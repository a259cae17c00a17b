// What upstream's ggml-cuda.cu finds in the place of cuda/ext-cuda.h where it is compiled for HIP or MUSA: none of our
// features. An op with data of our types or a sub-op of ours goes to another backend.

#ifndef GGML_EXT_CUDA_STUB_H
#define GGML_EXT_CUDA_STUB_H

#include "ggml.h"

struct ggml_backend_cuda_context;

enum ggml_ext_cuda_answer {
    GGML_EXT_CUDA_NOT_OURS,
    GGML_EXT_CUDA_NO,
    GGML_EXT_CUDA_YES,
};

static inline ggml_ext_cuda_answer ggml_ext_cuda_supports(int, const ggml_tensor * op) {
    bool ours = op->op == GGML_OP_EXT || op->type >= GGML_TYPE_FQ4;
    for (const ggml_tensor * source : op->src) {
        ours = ours || (source && source->type >= GGML_TYPE_FQ4);
    }
    return ours ? GGML_EXT_CUDA_NO : GGML_EXT_CUDA_NOT_OURS;
}

static inline bool ggml_ext_cuda_owns(const ggml_tensor *) {
    return false;
}

static inline void ggml_ext_cuda_check_settings(ggml_backend_cuda_context &) {}

static inline void ggml_ext_cuda_graph_begin(ggml_backend_cuda_context &) {}

static inline int ggml_ext_cuda_fuse(ggml_backend_cuda_context &, ggml_cgraph *, int) {
    return 0;
}

static inline bool ggml_ext_cuda_compute(ggml_backend_cuda_context &, ggml_tensor *) {
    return false;
}

static inline void ggml_ext_cuda_free(ggml_backend_cuda_context &) {}

#endif  // GGML_EXT_CUDA_STUB_H
