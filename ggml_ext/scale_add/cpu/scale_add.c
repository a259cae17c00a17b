#include "core/cpu/ext_op.h"
#include "ggml-cpu-impl.h"

#include <string.h>

static void scale_add_compute(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct ggml_tensor * a = dst->src[0];
    const struct ggml_tensor * b = dst->src[1];
    float                      scale;
    memcpy(&scale, dst->op_params + 1, sizeof(scale));

    const int64_t nrows = ggml_nrows(dst);
    for (int64_t row = params->ith; row < nrows; row += params->nth) {
        const int64_t i3 = row / (dst->ne[1] * dst->ne[2]);
        const int64_t i2 = row / dst->ne[1] % dst->ne[2];
        const int64_t i1 = row % dst->ne[1];
        const float * pa = (const float *) ((const char *) a->data + i1 * a->nb[1] + i2 * a->nb[2] + i3 * a->nb[3]);
        const float * pb = (const float *) ((const char *) b->data + i1 * b->nb[1] + i2 * b->nb[2] + i3 * b->nb[3]);
        float *       pd = (float *) ((char *) dst->data + i1 * dst->nb[1] + i2 * dst->nb[2] + i3 * dst->nb[3]);
        for (int64_t i0 = 0; i0 < dst->ne[0]; i0++) {
            pd[i0] = scale * pa[i0] + pb[i0];
        }
    }
}

const struct ggml_ext_cpu_op ggml_ext_cpu_scale_add = { scale_add_compute, NULL, NULL };
