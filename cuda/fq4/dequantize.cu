#include "common.cuh"
#include "dequantize.cuh"
#include "ext-cuda.h"
#include "mul_mat_match.h"

// Four values are written at a time.
static bool aligned_rows(const ggml_tensor * y) {
    const size_t size = ggml_type_size(y->type);
    return y->nb[0] == size && y->nb[1] % (4 * size) == 0 && y->nb[2] % (4 * size) == 0 && y->nb[3] % (4 * size) == 0;
}

static bool whole_blocks(const ggml_tensor * x) {
    return ggml_ext_fq4_has_kernels(x->type) && x->nb[0] == ggml_type_size(x->type);
}

static bool known_type(ggml_type type) {
    return type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16;
}

static void copy_strides(int64_t (&to)[4], const ggml_tensor * tensor) {
    for (int i = 0; i < GGML_MAX_DIMS; i++) {
        to[i] = tensor->nb[i];
    }
}

template <typename L, typename T>
static void launch(ggml_backend_cuda_context & ctx, const ggml_ext_fq4_dequantize_args & args) {
    const int64_t n_warps  = (args.n_rows * args.n_blocks * L::weights + 255) / 256;
    const int64_t n_blocks = (n_warps + ggml_ext_fq4_dequantize_warps - 1) / ggml_ext_fq4_dequantize_warps;
    const int64_t most     = ggml_cuda_info().devices[ctx.device].nsm * 16;  // 64 warps per SM
    CUDA_CHECK(ggml_ext_cuda_launch(ggml_ext_fq4_dequantize_kernel<L, T>, dim3(std::min(n_blocks, most)),
                                    dim3(32 * ggml_ext_fq4_dequantize_warps), 0, ctx.stream(), args));
}

template <typename L>
static void launch_to(ggml_type type, ggml_backend_cuda_context & ctx, const ggml_ext_fq4_dequantize_args & args) {
    switch (type) {
        case GGML_TYPE_F32:
            return launch<L, float>(ctx, args);
        case GGML_TYPE_F16:
            return launch<L, half>(ctx, args);
        default:
            return launch<L, nv_bfloat16>(ctx, args);
    }
}

// Rows of `shape`: y, or x where that differs and both are contiguous.
static void dequantize(ggml_backend_cuda_context & ctx, const ggml_tensor * x, const ggml_tensor * ids, ggml_tensor * y,
                       const ggml_tensor * shape) {
    if (ggml_is_empty(y)) {
        return;
    }
    ggml_ext_fq4_dequantize_args args = {};
    args.x                            = (const char *) x->data;
    args.ids                          = ids ? (const char *) ids->data : nullptr;
    args.y                            = (char *) y->data;
    args.n_blocks                     = shape->ne[0] / ggml_blck_size(x->type);
    args.ne1                          = shape->ne[1];
    args.ne2                          = shape->ne[2];
    args.n_rows                       = ggml_nrows(shape);
    copy_strides(args.nb_x, x);
    copy_strides(args.nb_y, y);
    if (ids) {
        copy_strides(args.nb_ids, ids);
    }
    if (shape != y) {
        const int64_t size = ggml_type_size(y->type);
        args.nb_y[1]       = shape->ne[0] * size;
        args.nb_y[2]       = args.nb_y[1] * shape->ne[1];
        args.nb_y[3]       = args.nb_y[2] * shape->ne[2];
    }
    x->type == GGML_TYPE_FQ4 ? launch_to<ggml_ext::fq4_layout>(y->type, ctx, args) :
                               launch_to<ggml_ext::fq4_64_layout>(y->type, ctx, args);
}

static bool get_rows_applies(int, const ggml_tensor * op) {
    return op->op == GGML_OP_GET_ROWS && whole_blocks(op->src[0]) && op->src[1]->type == GGML_TYPE_I32 &&
           op->type == GGML_TYPE_F32 && aligned_rows(op);
}

static void get_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    dequantize(ctx, dst->src[0], dst->src[1], dst, dst);
}

static bool same_rows(const ggml_tensor * x, const ggml_tensor * y) {
    return ggml_are_same_shape(x, y) && aligned_rows(y);
}

static bool dequantize_applies(int, const ggml_tensor * op) {
    if ((op->op != GGML_OP_CPY && op->op != GGML_OP_DUP && op->op != GGML_OP_CONT) || !whole_blocks(op->src[0]) ||
        !known_type(op->type)) {
        return false;
    }
    return same_rows(op->src[0], op) || (ggml_is_contiguous(op->src[0]) && ggml_is_contiguous(op));
}

static void dequantize_compute(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    dequantize(ctx, dst->src[0], nullptr, dst, same_rows(dst->src[0], dst) ? dst : dst->src[0]);
}

const ggml_ext_cuda_feature ggml_ext_cuda_fq4_get_rows   = { get_rows_applies, get_rows, nullptr };
const ggml_ext_cuda_feature ggml_ext_cuda_fq4_dequantize = { dequantize_applies, dequantize_compute, nullptr };
