#include "common.cuh"
#include "core/ext_op.h"
#include "ext-cuda.h"
#include "scale_add.cuh"

static bool applies(int, const ggml_tensor * op) {
    return op->op == GGML_OP_EXT && ggml_ext_get_op(op) == GGML_EXT_OP_SCALE_ADD;
}

static void compute(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * a = dst->src[0];
    const ggml_tensor * b = dst->src[1];
    float               scale;
    memcpy(&scale, dst->op_params + 1, sizeof(scale));

    ggml_ext_scale_add_shape shape;
    for (int i = 0; i < GGML_MAX_DIMS; i++) {
        shape.ne[i]   = dst->ne[i];
        shape.nb_a[i] = a->nb[i];
        shape.nb_b[i] = b->nb[i];
        shape.nb_y[i] = dst->nb[i];
    }
    const int64_t n_rows = ggml_nrows(dst);
    if (dst->ne[0] == 0 || n_rows == 0) {
        return;
    }
    CUDA_CHECK(ggml_ext_cuda_launch(ggml_ext_scale_add_kernel, dim3(std::min<int64_t>(n_rows, 65535)), dim3(256), 0,
                                    ctx.stream(), (const char *) a->data, (const char *) b->data, (char *) dst->data,
                                    scale, shape));
}

const ggml_ext_cuda_feature ggml_ext_cuda_scale_add = { applies, compute, nullptr };
