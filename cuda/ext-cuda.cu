#include "common.cuh"
#include "common/views.h"
#include "ext-cuda.h"
#include "fq4/mul_mat_match.h"
#include "hooks/ggml-ext-hooks.h"

static const ggml_ext_cuda_feature * const features[] = {
    &ggml_ext_cuda_scale_add,      &ggml_ext_cuda_act_round,   &ggml_ext_cuda_kron,      &ggml_ext_cuda_fq4_get_rows,
    &ggml_ext_cuda_fq4_dequantize, &ggml_ext_cuda_fq4_mul_mat, &ggml_ext_cuda_attention, &ggml_ext_cuda_sample,
};

static const ggml_ext_cuda_feature * find(int device, const ggml_tensor * op) {
    if (op->op == GGML_OP_EXT && ggml_ext_op_fault(op)) {
        return nullptr;  // it came over RPC, and no constructor of ours made it
    }
    for (const ggml_ext_cuda_feature * feature : features) {
        if (feature->applies(device, op)) {
            return feature;
        }
    }
    return nullptr;
}

// A copy of bytes, which upstream does for every type.
static bool is_plain_copy(const ggml_tensor * op) {
    return (op->op == GGML_OP_CPY || op->op == GGML_OP_DUP || op->op == GGML_OP_CONT) && op->type == op->src[0]->type &&
           ggml_is_contiguous(op) && ggml_is_contiguous(op->src[0]);
}

// Also the types of ours that have no kernels here: FQ3 and FQ3_64.
static bool needs_us(const ggml_tensor * op) {
    if (op->op == GGML_OP_EXT || op->type >= GGML_TYPE_FQ4) {
        return true;
    }
    for (const ggml_tensor * source : op->src) {
        if (source && source->type >= GGML_TYPE_FQ4) {
            return true;
        }
    }
    return false;
}

ggml_ext_cuda_answer ggml_ext_cuda_supports(int device, const ggml_tensor * op) {
    // The scheduler asks for every weight, and for views of it, where it lies.
    if (ggml_ext_is_leaf_or_view(op) || is_plain_copy(op)) {
        return GGML_EXT_CUDA_NOT_OURS;
    }
    if (find(device, op)) {
        return GGML_EXT_CUDA_YES;
    }
    return needs_us(op) ? GGML_EXT_CUDA_NO : GGML_EXT_CUDA_NOT_OURS;
}

bool ggml_ext_cuda_owns(const ggml_tensor * product) {
    return ggml_ext_fq4_has_kernels(product->src[0]->type);
}

int ggml_ext_cuda_fuse(ggml_backend_cuda_context & ctx, ggml_cgraph * graph, int i) {
    for (const ggml_ext_cuda_feature * feature : features) {
        const int following = feature->fuse ? feature->fuse(ctx, graph, i) : 0;
        if (following > 0) {
            return following;
        }
    }
    return 0;
}

bool ggml_ext_cuda_compute(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_ext_cuda_feature * feature = find(ctx.device, dst);
    if (!feature) {
        return false;
    }
    feature->compute(ctx, dst);
    return true;
}
