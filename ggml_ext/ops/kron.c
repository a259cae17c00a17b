#include "kron.h"

#include "ext-op-new.h"
#include "ggml-impl.h"

#include <string.h>

static void kron_check_factor(const struct ggml_tensor * factor, int64_t n) {
    GGML_ASSERT((factor->type == GGML_TYPE_F32 || factor->type == GGML_TYPE_F16) && "kron: a factor is F32 or F16");
    GGML_ASSERT(factor->ne[0] == factor->ne[1] && factor->ne[2] == 1 && factor->ne[3] == 1 &&
                "kron: a factor is a square matrix");
    GGML_ASSERT(ggml_is_contiguous(factor) && "kron: a factor is contiguous");
    GGML_ASSERT(n % factor->ne[0] == 0 && "kron: a factor's order divides the row length of x");
}

struct ggml_tensor * ggml_ext_kron(struct ggml_context * ctx, struct ggml_tensor * x, struct ggml_tensor * left,
                                   struct ggml_tensor * right, int hadamard, float clip) {
    GGML_ASSERT(x->type == GGML_TYPE_F32 && "kron: x is F32");
    GGML_ASSERT(x->nb[0] == sizeof(float) && "kron: the values of a row of x are adjacent");
    GGML_ASSERT(hadamard >= 0 && (hadamard & (hadamard - 1)) == 0 && "kron: hadamard is 0 or a power of two");
    GGML_ASSERT((right == NULL || hadamard <= 1) && "kron: hadamard takes the place of right");
    GGML_ASSERT(clip > 0.0f && clip <= 1.0f && "kron: clip is in (0, 1]");

    const int64_t n = x->ne[0];
    if (left) {
        kron_check_factor(left, n);
    }
    if (right) {
        kron_check_factor(right, n);
    }
    const int64_t right_order = right ? right->ne[0] : hadamard > 1 ? hadamard : 0;  // 0: follows from n
    GGML_ASSERT((right_order == 0 || n % right_order == 0) &&
                "kron: the order of hadamard divides the row length of x");
    GGML_ASSERT((left == NULL || right_order == 0 || left->ne[0] * right_order == n) &&
                "kron: the orders multiply to the row length of x");
    GGML_ASSERT((left || right_order > 0 || clip < 1.0f) && "kron: there is a factor or a clip");

    const struct ggml_ext_kron_params params = { hadamard, clip, 0 };
    struct ggml_tensor *              result = ggml_new_tensor(ctx, GGML_TYPE_F32, GGML_MAX_DIMS, x->ne);
    ggml_ext_op_init(result, GGML_EXT_OP_KRON, &params, sizeof(params));
    result->src[0] = x;
    result->src[1] = left;
    result->src[2] = right;
    return result;
}

void ggml_ext_kron_set_unobserved(struct ggml_tensor * kron) {
    struct ggml_ext_kron_params params;
    memcpy(&params, kron->op_params + 1, sizeof(params));
    params.unobserved = 1;
    memcpy(kron->op_params + 1, &params, sizeof(params));
}
