#include "activation/activation.cuh"
#include "common.cuh"
#include "common/architecture.h"
#include "core/ext_op.h"
#include "ext-cuda.h"
#include "general.cuh"
#include "kron.cuh"
#include "kron/kron.h"
#include "uses.h"

struct kron_op {
    ggml_ext_kron_args args;
    int                hadamard;    // order
    bool               unobserved;  // kron.h
    int64_t            n;
};

static ggml_ext_kron_factor factor_of(const ggml_tensor * t) {
    if (!t) {
        return { nullptr, 0, GGML_EXT_KRON_NONE };
    }
    return { t->data, int32_t(t->ne[0]), t->type == GGML_TYPE_F16 ? GGML_EXT_KRON_F16 : GGML_EXT_KRON_F32 };
}

static kron_op describe(const ggml_tensor * dst) {
    const ggml_tensor *  x = dst->src[0];
    ggml_ext_kron_params params;
    memcpy(&params, dst->op_params + 1, sizeof(params));

    kron_op op    = {};
    op.hadamard   = params.hadamard > 1 ? params.hadamard : 0;
    op.unobserved = params.unobserved != 0;
    op.n          = dst->ne[0];
    op.args.left  = factor_of(dst->src[1]);
    op.args.right = factor_of(dst->src[2]);
    if (op.hadamard) {
        op.args.right = { nullptr, op.hadamard, GGML_EXT_KRON_HADAMARD };
    }
    // Weights are leaves: no kernel of this stream writes them.
    op.args.factors_are_leaves =
        (!dst->src[1] || dst->src[1]->op == GGML_OP_NONE) && (!dst->src[2] || dst->src[2]->op == GGML_OP_NONE);
    op.args.x = static_cast<const char *>(x->data);
    op.args.y = static_cast<float *>(dst->data);

    ggml_ext_kron_shape & s = op.args.shape;
    const int64_t n2 = op.args.left.order ? op.n / op.args.left.order : op.args.right.order ? op.args.right.order : 1;
    s = { int32_t(op.n / n2), int32_t(n2),       ggml_nrows(dst),   uint32_t(x->ne[1]), uint32_t(x->ne[2]),
          int64_t(x->nb[1]),  int64_t(x->nb[2]), int64_t(x->nb[3]), params.clip };
    return op;
}

static ggml_ext_kron_plan plan_of(const kron_op & op, int device, int terms) {
    const auto &  info  = ggml_cuda_info().devices[device];
    const auto &  s     = op.args.shape;
    const int64_t bits  = int64_t(reinterpret_cast<uintptr_t>(op.args.x)) | s.nb1 | s.nb2 | s.nb3;
    const bool    cores = ggml_ext_cuda_has_tensor_cores(device);
    return ggml_ext_kron_plan_of(s, op.args.left.kind, op.args.right.kind, terms, bits % 16 == 0,
                                 cores ? info.smpbo : 0, info.nsm);
}

// --- any shape ---

template <typename A, typename B>
static void launch_product(const void * a, const void * b, float * c, const ggml_ext_kron_product & p,
                           const ggml_ext_kron_shape & s, cudaStream_t stream) {
    const int64_t n_blocks = ggml_ext_kron_product_blocks(p);
    GGML_ASSERT(n_blocks <= INT32_MAX);
    CUDA_CHECK(ggml_ext_cuda_launch(ggml_ext_kron_product_kernel<A, B>, dim3(n_blocks), dim3(GGML_EXT_KRON_FLAT), 0,
                                    stream, (const A *) a, (const B *) b, c, p, s));
}

static void multiply_left(const kron_op & op, float * z, cudaStream_t stream) {
    const ggml_ext_kron_args & a = op.args;
    const auto launch = a.left.kind == GGML_EXT_KRON_F16 ? launch_product<half, float> : launch_product<float, float>;
    launch(a.left.data, a.x, z, ggml_ext_kron_left_product(a.shape), a.shape, stream);
}

static void multiply_right(const kron_op & op, const void * z, bool z_is_x, cudaStream_t stream) {
    const ggml_ext_kron_args & a = op.args;
    const auto launch = a.right.kind == GGML_EXT_KRON_F16 ? launch_product<float, half> : launch_product<float, float>;
    launch(z, a.right.data, a.y, ggml_ext_kron_right_product(a.shape, z_is_x), a.shape, stream);
}

static void transform_hadamard(const kron_op & op, int order, const void * from, const ggml_ext_kron_shape & s,
                               cudaStream_t stream) {
    const int     chunk    = ggml_ext_kron_chunk(order);
    const int64_t n_blocks = (op.n + chunk - 1) / chunk * s.n_tokens;
    GGML_ASSERT(n_blocks <= INT32_MAX);
    CUDA_CHECK(ggml_ext_cuda_launch(ggml_ext_kron_hadamard_kernel, dim3(n_blocks), dim3(GGML_EXT_KRON_FLAT),
                                    chunk * sizeof(float), stream, (const char *) from, op.args.y, order, op.n, s));
}

static void compute_general(ggml_backend_cuda_context & ctx, const kron_op & op) {
    const ggml_ext_kron_args & a      = op.args;
    cudaStream_t               stream = ctx.stream();
    const bool                 left   = a.left.kind != GGML_EXT_KRON_NONE;
    const bool                 matrix = a.right.kind == GGML_EXT_KRON_F32 || a.right.kind == GGML_EXT_KRON_F16;

    ggml_cuda_pool_alloc<float> z(ctx.pool());
    if (left) {
        multiply_left(op, matrix ? z.alloc(op.n * a.shape.n_tokens) : a.y, stream);
    }
    if (matrix) {
        multiply_right(op, left ? (const void *) z.get() : a.x, !left, stream);
    } else if (left && op.hadamard) {
        transform_hadamard(op, op.hadamard, a.y, ggml_ext_kron_result_shape(a.shape), stream);
    } else if (!left) {
        transform_hadamard(op, op.hadamard ? op.hadamard : 1, a.x, a.shape, stream);
    }
    if (a.shape.clip < 1.0f) {
        GGML_ASSERT(a.shape.n_tokens <= INT32_MAX);
        CUDA_CHECK(ggml_ext_cuda_launch(ggml_ext_kron_clip_kernel, dim3(a.shape.n_tokens), dim3(GGML_EXT_KRON_FLAT), 0,
                                        stream, a.y, op.n, a.shape.clip));
    }
}

// --- tensor cores ---

template <int TERMS, int NT, int UNITS>
static void launch_tiles(const ggml_ext_kron_args & args, const ggml_ext_kron_plan & plan, cudaStream_t stream) {
    const auto kernel = ggml_ext_kron_kernel<TERMS, NT, UNITS>;
    CUDA_CHECK(ggml_ext_cuda_launch_overlapped(kernel, dim3(plan.n_blocks), dim3(32 * plan.n_warps), plan.shared_bytes,
                                               stream, args));
}

template <int TERMS>
static void compute_tiles(const ggml_ext_kron_args & args, const ggml_ext_kron_plan & plan, cudaStream_t stream) {
    if (plan.n_tiles == 2) {
        launch_tiles<TERMS, 2, 1>(args, plan, stream);
    } else if (plan.units == 1) {
        launch_tiles<TERMS, 8, 1>(args, plan, stream);
    } else {
        launch_tiles<TERMS, 8, 2>(args, plan, stream);
    }
}

static bool applies(int, const ggml_tensor * op) {
    if (op->op != GGML_OP_EXT || ggml_ext_get_op(op) != GGML_EXT_OP_KRON) {
        return false;
    }
    ggml_ext_kron_params params;
    memcpy(&params, op->op_params + 1, sizeof(params));
    return params.hadamard <= GGML_EXT_KRON_MAX_HADAMARD;
}

// --- fusion with the quantiser of the products ---

// What fuse() found for the node that compute() gets next, on the same thread.
static thread_local struct {
    const ggml_tensor * node;
    ggml_ext_kron_uses  uses;
    bool                one_stream;  // whatever reads the result runs on the node's own stream
} upcoming;

// Joins no node: it looks ahead.
static int fuse(ggml_backend_cuda_context & ctx, ggml_cgraph * graph, int i) {
    const ggml_tensor * node = graph->nodes[i];
    if (node->op == GGML_OP_EXT && ggml_ext_get_op(node) == GGML_EXT_OP_KRON) {
        upcoming = { node, ggml_ext_kron_uses_of(graph, i), ctx.stream_context().concurrent_events.empty() };
    }
    return 0;
}

// Writes the int8 form for the products, in the same launch; false: cannot for this shape.
// One term of f16 is enough for a result that is rounded to int8 next and read by nothing else (docs/kron.md). The F32
// result is left out where, besides, nobody outside the graph looks at it.
static bool compute_quantized(ggml_backend_cuda_context & ctx, const kron_op & op, const ggml_tensor * dst) {
    const ggml_ext_kron_shape & s = op.args.shape;
    if (upcoming.node != dst || upcoming.uses.n_products == 0 || s.n2 % 16 != 0 ||
        op.n % GGML_EXT_ACTIVATION_GROUP != 0) {
        return false;
    }
    const bool alone = upcoming.uses.no_others;
    const auto plan  = plan_of(op, ctx.device, alone ? 1 : 3);
    if (!plan.tensor_cores) {
        return false;
    }
    const bool         codes_only = alone && op.unobserved && upcoming.one_stream;
    const auto         q          = ggml_ext_cuda_quantized_reserve(ctx, dst, codes_only);
    ggml_ext_kron_args args       = op.args;
    args.codes                    = q.codes;
    args.scales                   = q.scales;
    args.y                        = codes_only ? nullptr : args.y;
    if (alone) {
        compute_tiles<1>(args, plan, ctx.stream());
    } else {
        compute_tiles<3>(args, plan, ctx.stream());
    }
    return true;
}

static void compute(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    if (ggml_is_empty(dst)) {
        return;
    }
    const kron_op op   = describe(dst);
    const bool    done = compute_quantized(ctx, op, dst);
    upcoming           = {};
    if (done) {
        return;
    }
    if (const auto plan = plan_of(op, ctx.device, 3); plan.tensor_cores) {
        compute_tiles<3>(op.args, plan, ctx.stream());
    } else {
        compute_general(ctx, op);
    }
}

const ggml_ext_cuda_feature ggml_ext_cuda_kron = { applies, compute, fuse };
