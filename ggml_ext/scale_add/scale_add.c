#include "core/ext_op_new.h"
#include "ggml-impl.h"

const char * ggml_ext_scale_add_fault(const struct ggml_tensor * dst) {
    const struct ggml_tensor * a = dst->src[0];
    const struct ggml_tensor * b = dst->src[1];
    if (a == NULL || b == NULL || a->type != GGML_TYPE_F32 || b->type != GGML_TYPE_F32) {
        return "scale_add: a and b are F32";
    }
    if (!ggml_are_same_shape(a, b)) {
        return "scale_add: a and b have one shape";
    }
    if (a->nb[0] != sizeof(float) || b->nb[0] != sizeof(float)) {
        return "scale_add: the values of a row of a and b are adjacent";
    }
    return dst->type == GGML_TYPE_F32 && ggml_is_contiguous(dst) && ggml_are_same_shape(dst, a) ?
               NULL :
               "scale_add: the result is F32, contiguous, of the shape of a";
}

struct ggml_tensor * ggml_ext_scale_add(struct ggml_context * ctx, struct ggml_tensor * a, struct ggml_tensor * b,
                                        float scale) {
    struct ggml_tensor * result = ggml_new_tensor(ctx, GGML_TYPE_F32, GGML_MAX_DIMS, a->ne);
    ggml_ext_op_init(result, GGML_EXT_OP_SCALE_ADD, &scale, sizeof(scale));
    result->src[0] = a;
    result->src[1] = b;
    ggml_ext_op_check(result);
    return result;
}
