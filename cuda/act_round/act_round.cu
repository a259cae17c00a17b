#include "act_round.cuh"
#include "act_round/act_round.h"
#include "common.cuh"
#include "core/ext_op.h"
#include "ext-cuda.h"

static bool applies(int, const ggml_tensor * op) {
    return op->op == GGML_OP_EXT && ggml_ext_get_op(op) == GGML_EXT_OP_ACT_ROUND;
}

static void compute(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    if (ggml_is_empty(dst)) {
        return;
    }
    const ggml_tensor *              x = dst->src[0];
    struct ggml_ext_act_round_params params;
    memcpy(&params, dst->op_params + 1, sizeof(params));
    const int64_t group = params.group > 0 && params.group < x->ne[0] ? params.group : x->ne[0];

    const ggml_ext_act_round_shape shape = {
        x->ne[0],           ggml_nrows(x),      group,
        uint32_t(x->ne[1]), uint32_t(x->ne[2]), int64_t(x->nb[1]),
        int64_t(x->nb[2]),  int64_t(x->nb[3]),  float((1 << (params.bits - 1)) - 1),
    };
    const int64_t n_blocks = ggml_ext_act_round_blocks(shape);
    GGML_ASSERT(n_blocks <= INT32_MAX);
    const auto kernel = ggml_ext_act_round_lanes(group) == 32 ? ggml_ext_act_round_kernel<32> :
                                                                ggml_ext_act_round_kernel<GGML_EXT_ACT_ROUND_THREADS>;
    CUDA_CHECK(ggml_ext_cuda_launch(kernel, dim3(n_blocks), dim3(GGML_EXT_ACT_ROUND_THREADS), 0, ctx.stream(),
                                    (const char *) x->data, (float *) dst->data, shape));
}

const ggml_ext_cuda_feature ggml_ext_cuda_act_round = { applies, compute, nullptr };
