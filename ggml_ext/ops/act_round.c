#include "act_round.h"

#include "ext-op-new.h"
#include "ggml-impl.h"

struct ggml_tensor * ggml_ext_act_round(struct ggml_context * ctx, struct ggml_tensor * x, int bits, int group) {
    GGML_ASSERT(x->type == GGML_TYPE_F32 && "act_round: x is F32");
    GGML_ASSERT(x->nb[0] == sizeof(float) && "act_round: the values of a row of x are adjacent");
    GGML_ASSERT(bits >= 2 && bits <= 8 && "act_round: bits is 2 to 8");
    GGML_ASSERT(group >= 0 && "act_round: group is 0 for the whole row, or the number of values that share a scale");

    const struct ggml_ext_act_round_params params = { bits, group };
    struct ggml_tensor *                   result = ggml_new_tensor(ctx, GGML_TYPE_F32, GGML_MAX_DIMS, x->ne);
    ggml_ext_op_init(result, GGML_EXT_OP_ACT_ROUND, &params, sizeof(params));
    result->src[0] = x;
    return result;
}
