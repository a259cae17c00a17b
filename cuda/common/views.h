// Nodes that compute nothing.

#ifndef GGML_EXT_CUDA_VIEWS_H
#define GGML_EXT_CUDA_VIEWS_H

#include "ggml.h"

// A leaf, or another look at the data of a tensor (upstream's ggml_is_view_op, which is static, and NONE).
inline bool ggml_ext_is_leaf_or_view(const ggml_tensor * op) {
    return op->op == GGML_OP_NONE || op->op == GGML_OP_VIEW || op->op == GGML_OP_RESHAPE || op->op == GGML_OP_PERMUTE ||
           op->op == GGML_OP_TRANSPOSE;
}

#endif  // GGML_EXT_CUDA_VIEWS_H
