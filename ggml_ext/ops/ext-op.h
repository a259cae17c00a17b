// GGML_OP_EXT: the one op of ours that upstream's enum holds. A sub-op id in op_params[0] says what
// it computes; op_params[1..] and src[] belong to the sub-op. Adding a sub-op: docs/adding-an-op.md.

#ifndef GGML_EXT_OP_H
#define GGML_EXT_OP_H

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

// Ids go over RPC: never renumber.
enum ggml_ext_op {
    GGML_EXT_OP_SCALE_ADD = 0,
    GGML_EXT_OP_COUNT,
};

// Name of a sub-op ("scale_add"), or "unknown" for an id that this build does not have.
GGML_API const char * ggml_ext_op_name(int32_t sub_op);

// The sub-op id of a GGML_OP_EXT tensor.
static inline int32_t ggml_ext_get_op(const struct ggml_tensor * tensor) {
    return tensor->op_params[0];
}

// scale * a + b, element by element: the plainest sub-op, kept as the test of the dispatch and as
// the example of docs/adding-an-op.md.
// a, b: F32, same shape, rows contiguous (nb[0] == 4). Result: F32, shape of a.
GGML_API struct ggml_tensor * ggml_ext_scale_add(struct ggml_context * ctx, struct ggml_tensor * a,
                                                 struct ggml_tensor * b, float scale);

#ifdef __cplusplus
}
#endif

#endif  // GGML_EXT_OP_H
