#include "ext-op-new.h"
#include "ggml-impl.h"

struct ggml_tensor * ggml_ext_scale_add(struct ggml_context * ctx, struct ggml_tensor * a, struct ggml_tensor * b,
                                        float scale) {
    GGML_ASSERT(a->type == GGML_TYPE_F32 && b->type == GGML_TYPE_F32);
    GGML_ASSERT(ggml_are_same_shape(a, b));
    GGML_ASSERT(a->nb[0] == sizeof(float) && b->nb[0] == sizeof(float));
    struct ggml_tensor * result = ggml_new_tensor(ctx, GGML_TYPE_F32, GGML_MAX_DIMS, a->ne);
    ggml_ext_op_init(result, GGML_EXT_OP_SCALE_ADD, &scale, sizeof(scale));
    result->src[0] = a;
    result->src[1] = b;
    return result;
}
