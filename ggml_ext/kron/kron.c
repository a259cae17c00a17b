#include "kron.h"

#include "core/ext_op_new.h"
#include "ggml-impl.h"

#include <string.h>

static const char * kron_factor_fault(const struct ggml_tensor * factor, int64_t n) {
    if (factor->type != GGML_TYPE_F32 && factor->type != GGML_TYPE_F16) {
        return "kron: a factor is F32 or F16";
    }
    if (factor->ne[0] < 1 || factor->ne[0] != factor->ne[1] || factor->ne[2] != 1 || factor->ne[3] != 1) {
        return "kron: a factor is a square matrix";
    }
    if (!ggml_is_contiguous(factor)) {
        return "kron: a factor is contiguous";
    }
    return n % factor->ne[0] == 0 ? NULL : "kron: a factor's order divides the row length of x";
}

static const char * kron_params_fault(const struct ggml_ext_kron_params * params, bool right) {
    if (params->hadamard < 0 || (params->hadamard & (params->hadamard - 1)) != 0) {
        return "kron: hadamard is 0 or a power of two";
    }
    if (right && params->hadamard > 1) {
        return "kron: hadamard takes the place of right";
    }
    return params->clip > 0.0f && params->clip <= 1.0f ? NULL : "kron: clip is in (0, 1]";
}

const char * ggml_ext_kron_fault(const struct ggml_tensor * dst) {
    const struct ggml_tensor *  x     = dst->src[0];
    const struct ggml_tensor *  left  = dst->src[1];
    const struct ggml_tensor *  right = dst->src[2];
    struct ggml_ext_kron_params params;
    memcpy(&params, dst->op_params + 1, sizeof(params));
    if (x == NULL || x->type != GGML_TYPE_F32) {
        return "kron: x is F32";
    }
    if (x->nb[0] != sizeof(float)) {
        return "kron: the values of a row of x are adjacent";
    }
    if (dst->type != GGML_TYPE_F32 || !ggml_is_contiguous(dst) || !ggml_are_same_shape(dst, x)) {
        return "kron: the result is F32, contiguous, of the shape of x";
    }
    const char * fault = kron_params_fault(&params, right != NULL);
    if (fault == NULL && left != NULL) {
        fault = kron_factor_fault(left, x->ne[0]);
    }
    if (fault == NULL && right != NULL) {
        fault = kron_factor_fault(right, x->ne[0]);
    }
    if (fault != NULL) {
        return fault;
    }
    const int64_t n           = x->ne[0];
    const int64_t right_order = right ? right->ne[0] : params.hadamard > 1 ? params.hadamard : 0;  // 0: follows from n
    if (right_order != 0 && n % right_order != 0) {
        return "kron: the order of hadamard divides the row length of x";
    }
    if (left != NULL && right_order != 0 && left->ne[0] * right_order != n) {
        return "kron: the orders multiply to the row length of x";
    }
    return left || right_order > 0 || params.clip < 1.0f ? NULL : "kron: there is a factor or a clip";
}

struct ggml_tensor * ggml_ext_kron(struct ggml_context * ctx, struct ggml_tensor * x, struct ggml_tensor * left,
                                   struct ggml_tensor * right, int hadamard, float clip) {
    const struct ggml_ext_kron_params params = { hadamard, clip, 0 };
    struct ggml_tensor *              result = ggml_new_tensor(ctx, GGML_TYPE_F32, GGML_MAX_DIMS, x->ne);
    ggml_ext_op_init(result, GGML_EXT_OP_KRON, &params, sizeof(params));
    result->src[0] = x;
    result->src[1] = left;
    result->src[2] = right;
    ggml_ext_op_check(result);
    return result;
}

void ggml_ext_kron_set_unobserved(struct ggml_tensor * kron) {
    struct ggml_ext_kron_params params;
    memcpy(&params, kron->op_params + 1, sizeof(params));
    params.unobserved = 1;
    memcpy(kron->op_params + 1, &params, sizeof(params));
}
