// MUL_MAT and MUL_MAT_ID with FQ4 or FQ4_64 weights: which kernel takes which product, and fusion with what follows.

#include "activation/activation.cuh"
#include "common.cuh"
#include "common/architecture.h"
#include "common/tuning.h"
#include "ext-cuda.h"
#include "mul_mat_match.h"
#include "tiles.h"
#include "vec.h"

static bool applies(int device, const ggml_tensor * op) {
    return ggml_ext_fq4_is_product(op) && ggml_ext_cuda_has_dp4a(device);
}

static ggml_ext_fq4_vec_args vec_args(ggml_backend_cuda_context & ctx, const ggml_tensor * product,
                                      const ggml_tensor * dst) {
    const ggml_tensor *            x    = product->src[0];
    const ggml_tensor *            y    = product->src[1];
    const ggml_tensor *            ids  = product->op == GGML_OP_MUL_MAT_ID ? product->src[2] : nullptr;
    const ggml_ext_cuda_activation acts = ggml_ext_cuda_quantized(ctx, y, ggml_blck_size(x->type));
    ggml_ext_fq4_vec_args          args = {};
    args.x                              = (const char *) x->data;
    args.codes                          = acts.codes;
    args.scales                         = acts.scales;
    args.n_act_rows                     = acts.n_rows;
    args.dst                            = (char *) dst->data;
    args.n_rows                         = x->ne[1];
    args.n_blocks                       = x->ne[0] / ggml_blck_size(x->type);
    args.ne11                           = y->ne[1];
    args.nb01                           = x->nb[1];
    args.nb02                           = x->nb[2];
    args.nb03                           = x->nb[3];
    args.nb1                            = dst->nb[1];
    args.nb2                            = dst->nb[2];
    args.nb3                            = dst->nb[3];
    if (ids) {
        args.ids       = (const char *) ids->data;
        args.nb_ids0   = ids->nb[0];
        args.nb_ids1   = ids->nb[1];
        args.ne2       = ids->ne[0];
        args.n_batches = ids->ne[0] * ids->ne[1];
    } else {
        args.ne2       = dst->ne[2];
        args.ratio2    = dst->ne[2] / x->ne[2];
        args.ratio3    = dst->ne[3] / x->ne[3];
        args.n_batches = dst->ne[2] * dst->ne[3];
    }
    return args;
}

static bool takes_tiles(int device, const ggml_tensor * dst) {
    const int64_t n_columns = dst->ne[dst->op == GGML_OP_MUL_MAT ? 1 : 2];  // of a matrix, or tokens
    return n_columns >= ggml_ext::fq4_tiles_min_columns && ggml_ext_cuda_fq4_tiles_applies(device, dst);
}

static void compute(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    if (ggml_is_empty(dst)) {
        return;
    }
    if (takes_tiles(ctx.device, dst)) {
        ggml_ext_cuda_fq4_tiles(ctx, dst);
        return;
    }
    ggml_ext_fq4_vec_args args   = vec_args(ctx, dst, dst);
    const int64_t         n_cols = args.ids ? 1 : dst->ne[1];
    for (; args.first_col < n_cols; args.first_col += GGML_EXT_FQ4_VEC_MAX_COLS) {
        ggml_ext_cuda_fq4_vec(ctx, dst->src[0]->type,
                              std::min<int64_t>(GGML_EXT_FQ4_VEC_MAX_COLS, n_cols - args.first_col), args);
    }
}

static ggml_ext_fq4_vec_glu glu_of(const ggml_tensor * glu) {
    switch (ggml_get_glu_op(glu)) {
        case GGML_GLU_OP_SWIGLU:
            return GGML_EXT_FQ4_VEC_SWIGLU;
        case GGML_GLU_OP_GEGLU:
            return GGML_EXT_FQ4_VEC_GEGLU;
        case GGML_GLU_OP_SWIGLU_OAI:
            return GGML_EXT_FQ4_VEC_SWIGLU_OAI;
        case GGML_GLU_OP_SWIGLU_CLAMP:
            return GGML_EXT_FQ4_VEC_SWIGLU_CLAMP;
        default:
            GGML_ABORT("a gated linear unit that ggml_ext_fq4_find_fusion does not find");
    }
}

static int fuse(ggml_backend_cuda_context & ctx, ggml_cgraph * graph, int i) {
    const ggml_ext_fq4_fusion f = ggml_ext_fq4_find_fusion(graph, i);
    if (f.following == 0) {
        return 0;
    }
    ggml_ext_fq4_vec_args args = vec_args(ctx, f.product, f.dst);
    if (f.bias) {
        args.bias     = (const char *) f.bias->data;
        args.nb_bias1 = f.bias->nb[1];
        args.nb_bias2 = f.bias->nb[2];
        args.nb_bias3 = f.bias->nb[3];
    }
    if (f.gate) {
        args.gate      = (const char *) f.gate->src[0]->data;
        args.gate_bias = f.gate_bias ? (const char *) f.gate_bias->data : nullptr;
        args.glu       = glu_of(f.dst);
        args.glu_alpha = ggml_get_op_params_f32(f.dst, 2);
        args.glu_limit = ggml_get_op_params_f32(f.dst, 3);
    }
    ggml_ext_cuda_fq4_vec(ctx, f.product->src[0]->type, 1, args);
    return f.following;
}

const ggml_ext_cuda_feature ggml_ext_cuda_fq4_mul_mat = { applies, compute, fuse };
