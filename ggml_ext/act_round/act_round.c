#include "act_round.h"

#include "core/ext_op_new.h"
#include "ggml-impl.h"

#include <string.h>

const char * ggml_ext_act_round_fault(const struct ggml_tensor * dst) {
    const struct ggml_tensor *       x = dst->src[0];
    struct ggml_ext_act_round_params params;
    memcpy(&params, dst->op_params + 1, sizeof(params));
    if (x == NULL || x->type != GGML_TYPE_F32) {
        return "act_round: x is F32";
    }
    if (x->nb[0] != sizeof(float)) {
        return "act_round: the values of a row of x are adjacent";
    }
    if (dst->type != GGML_TYPE_F32 || !ggml_is_contiguous(dst) || !ggml_are_same_shape(dst, x)) {
        return "act_round: the result is F32, contiguous, of the shape of x";
    }
    if (params.bits < 2 || params.bits > 8) {
        return "act_round: bits is 2 to 8";
    }
    return params.group >= 0 ? NULL :
                               "act_round: group is 0 for the whole row, or the number of values that share a scale";
}

struct ggml_tensor * ggml_ext_act_round(struct ggml_context * ctx, struct ggml_tensor * x, int bits, int group) {
    const struct ggml_ext_act_round_params params = { bits, group };
    struct ggml_tensor *                   result = ggml_new_tensor(ctx, GGML_TYPE_F32, GGML_MAX_DIMS, x->ne);
    ggml_ext_op_init(result, GGML_EXT_OP_ACT_ROUND, &params, sizeof(params));
    result->src[0] = x;
    ggml_ext_op_check(result);
    return result;
}
