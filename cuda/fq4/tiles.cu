#include "activation/activation.cuh"
#include "common.cuh"
#include "common/architecture.h"
#include "common/device.cuh"
#include "mul_mat_match.h"
#include "tiles.h"
#include "tiles_dp4a.cuh"
#include "tiles_experts.cuh"
#include "tiles_instances.h"

#include <climits>

// dst's columns for one batch of weights.
static ggml_ext_fq4_tiling choose_tiling(int device, const ggml_tensor * dst) {
    const ggml_tensor * weights   = dst->src[0];
    const auto &        info      = ggml_cuda_info().devices[device];
    const bool          experts   = dst->op == GGML_OP_MUL_MAT_ID;
    const int64_t       n         = experts ? dst->ne[1] * dst->ne[2] : dst->ne[1];
    const int64_t       n_batches = experts ? 1 : dst->ne[2] * dst->ne[3];
    const int64_t       n_experts = experts ? weights->ne[2] : 0;
    const int64_t       m         = weights->ne[1];
    const int           block     = int(ggml_blck_size(weights->type));
    if (!ggml_ext_cuda_has_tensor_cores(device)) {
        return ggml_ext_fq4_dp4a_tiling(m, n, n_batches, n_experts);
    }
    return experts ? ggml_ext_fq4_choose_expert_tiling(m, block, n, n_experts, info.smpbo) :
                     ggml_ext_fq4_choose_tiling(m, weights->ne[0] / block, block, n, n_batches, info.nsm, info.smpbo);
}

// Numbers that the kernels hold in 32 bits.
static bool fits(const ggml_tensor * dst) {
    const ggml_tensor * weights   = dst->src[0];
    const int64_t       row_tiles = weights->ne[1] / GGML_EXT_FQ4_DP4A_ROWS + 1;
    const int64_t       columns   = ggml_nrows(dst) / 16 + dst->ne[2] * dst->ne[3] + weights->ne[2];
    return ggml_nrows(dst) < INT_MAX && ggml_nrows(dst->src[1]) < INT_MAX && weights->ne[0] < INT_MAX &&
           weights->ne[1] < INT_MAX && weights->ne[2] < INT_MAX &&
           columns < INT_MAX / row_tiles / (weights->ne[0] / ggml_blck_size(weights->type));
}

bool ggml_ext_cuda_fq4_tiles_applies(int device, const ggml_tensor * dst) {
    if (dst->op != GGML_OP_MUL_MAT && dst->op != GGML_OP_MUL_MAT_ID) {
        return false;
    }
    const ggml_tensor * weights     = dst->src[0];
    const ggml_tensor * activations = dst->src[1];
    if (!ggml_ext_cuda_has_dp4a(device)) {
        return false;
    }
    const bool types =
        ggml_ext_fq4_has_kernels(weights->type) && activations->type == GGML_TYPE_F32 && dst->type == GGML_TYPE_F32;
    if (!types || weights->nb[0] != ggml_type_size(weights->type) || activations->nb[0] != sizeof(float) ||
        dst->nb[0] != sizeof(float) || ggml_is_empty(weights) || ggml_is_empty(dst) || !fits(dst)) {
        return false;
    }
    if (dst->op == GGML_OP_MUL_MAT_ID) {
        const ggml_tensor * ids = dst->src[2];
        return ids->type == GGML_TYPE_I32 && ids->nb[0] == sizeof(int32_t) && dst->ne[3] == 1;
    }
    return true;
}

static ggml_ext_fq4_product describe(const ggml_tensor * dst, const ggml_ext_cuda_activation & x,
                                     const ggml_ext_fq4_tiling & tiling) {
    const ggml_tensor *  weights = dst->src[0];
    ggml_ext_fq4_product p       = {};
    p.weights                    = (const char *) weights->data;
    p.nb1                        = weights->nb[1];
    p.nb2                        = weights->nb[2];
    p.nb3                        = weights->nb[3];
    p.m                          = weights->ne[1];
    p.n_blocks                   = weights->ne[0] / ggml_blck_size(weights->type);
    p.k                          = weights->ne[0];
    p.codes                      = x.codes;
    p.scales                     = x.scales;
    p.n_activations              = x.n_rows;
    p.dst                        = (float *) dst->data;
    p.s1                         = dst->nb[1] / sizeof(float);
    p.s2                         = dst->nb[2] / sizeof(float);
    p.s3                         = dst->nb[3] / sizeof(float);
    p.n                          = dst->ne[1];
    p.ne2                        = dst->ne[2];
    p.ne3                        = dst->ne[3];
    p.repeat2                    = dst->ne[2] / weights->ne[2];
    p.repeat3                    = dst->ne[3] / weights->ne[3];
    p.n_used                     = dst->ne[1];
    p.ne1                        = dst->src[1]->ne[1];
    p.column_tiles               = tiling.column_tiles;
    p.row_tiles                  = tiling.row_tiles;
    p.n_ranges                   = tiling.n_ranges;
    return p;
}

template <typename L>
static cudaError_t launch(const ggml_ext_fq4_product & p, const ggml_ext_fq4_tiling & t, bool tensor_cores,
                          cudaStream_t stream) {
    if (!tensor_cores) {
        return ggml_ext_cuda_launch(ggml_ext_fq4_tiles_dp4a<L>, dim3(p.n_ranges), dim3(GGML_EXT_FQ4_DP4A_THREADS), 0,
                                    stream, p);
    }
    switch (t.columns) {
        case 16:
            return ggml_ext_fq4_tiles_launch<L, 16>(p, t.split, stream);
        case 32:
            return ggml_ext_fq4_tiles_launch<L, 32>(p, t.split, stream);
        case 64:
            return ggml_ext_fq4_tiles_launch<L, 64>(p, t.split, stream);
        default:
            return ggml_ext_fq4_tiles_launch<L, 128>(p, t.split, stream);
    }
}

void ggml_ext_cuda_fq4_tiles(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_ext_fq4_tiling t = choose_tiling(ctx.device, dst);
    ggml_ext_fq4_product      p =
        describe(dst, ggml_ext_cuda_quantized(ctx, dst->src[1], ggml_blck_size(dst->src[0]->type)), t);
    cudaStream_t stream = ctx.stream();

    ggml_cuda_pool_alloc<float>                    partial(ctx.pool());
    ggml_cuda_pool_alloc<int32_t>                  pairs(ctx.pool());
    ggml_cuda_pool_alloc<ggml_ext_fq4_expert_tile> tiles(ctx.pool());
    if (t.split) {
        p.partial = partial.alloc((size_t) t.n_ranges * t.columns * GGML_EXT_FQ4_TILE_ROWS);
    }
    if (dst->op == GGML_OP_MUL_MAT_ID) {
        const ggml_tensor * ids = dst->src[2];
        p.pairs                 = pairs.alloc(ggml_nelements(ids));
        p.tiles                 = tiles.alloc(t.column_tiles);
        CUDA_CHECK(ggml_ext_cuda_launch(ggml_ext_fq4_tiles_sort, dim3(dst->src[0]->ne[2]),
                                        dim3(GGML_EXT_FQ4_SORT_THREADS), 0, stream, (const int32_t *) ids->data,
                                        ids->nb[1] / sizeof(int32_t), ids->ne[1], ids->ne[0], t.columns, pairs.get(),
                                        tiles.get(), t.column_tiles));
    }
    const bool tensor_cores = ggml_ext_cuda_has_tensor_cores(ctx.device);
    CUDA_CHECK(dst->src[0]->type == GGML_TYPE_FQ4 ? launch<ggml_ext::fq4_layout>(p, t, tensor_cores, stream) :
                                                    launch<ggml_ext::fq4_64_layout>(p, t, tensor_cores, stream));
}
