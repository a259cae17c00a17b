#include "common.cuh"
#include "common/views.h"
#include "core/ext_op.h"
#include "ext-cuda.h"
#include "sample.cuh"

using namespace ggml_ext;

static bool is_sample(const ggml_tensor * op) {
    return op->op == GGML_OP_EXT && ggml_ext_get_op(op) == GGML_EXT_OP_SAMPLE;
}

static bool applies(int, const ggml_tensor * op) {
    return is_sample(op);
}

static sample_row row_of(const ggml_tensor * dst, int64_t row) {
    const ggml_tensor * logits     = dst->src[0];
    const ggml_tensor * parameters = dst->src[1];
    const ggml_tensor * ids        = dst->src[2];
    return { (const float *) ((const char *) logits->data + row * logits->nb[1]),
             (const int32_t *) ((const char *) parameters->data + row * parameters->nb[1]),
             ids ? (const int32_t *) ((const char *) ids->data + row * ids->nb[1]) : nullptr,
             (int32_t *) dst->data + row };
}

static void launch(ggml_backend_cuda_context & ctx, const sample_batch & batch, int n_rows) {
    CUDA_CHECK(
        ggml_ext_cuda_launch(ggml_ext_sample_kernel, dim3(n_rows), dim3(sample_max_threads), 0, ctx.stream(), batch));
}

static void compute(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    sample_batch batch;
    batch.n_vocab = int32_t(dst->src[0]->ne[0]);
    for (int64_t first = 0; first < dst->ne[0]; first += sample_rows) {
        const int n_rows = int(std::min<int64_t>(sample_rows, dst->ne[0] - first));
        for (int i = 0; i < n_rows; i++) {
            batch.rows[i] = row_of(dst, first + i);
        }
        launch(ctx, batch, n_rows);
    }
}

static bool overlaps(const ggml_tensor * a, const ggml_tensor * b) {
    const char * from_a = (const char *) a->data;
    const char * from_b = (const char *) b->data;
    return from_a < from_b + ggml_nbytes(b) && from_b < from_a + ggml_nbytes(a);
}

// Whether two of these ops can run at the same time: none writes what the other one reads or writes.
static bool independent(const ggml_tensor * a, const ggml_tensor * b) {
    if (overlaps(a, b)) {
        return false;
    }
    for (int i = 0; i < 3; i++) {
        if ((b->src[i] && overlaps(a, b->src[i])) || (a->src[i] && overlaps(b, a->src[i]))) {
            return false;
        }
    }
    return true;
}

// llama.cpp samples each sequence with an op of its own: those that follow one another become one launch.
static int fuse(ggml_backend_cuda_context & ctx, ggml_cgraph * graph, int first) {
    if (!is_sample(graph->nodes[first])) {
        return 0;
    }
    const ggml_tensor * nodes[sample_rows];
    int                 n    = 0;
    int                 last = first;
    for (int i = first; i < graph->n_nodes && n < sample_rows; i++) {
        const ggml_tensor * op = graph->nodes[i];
        if (ggml_ext_is_leaf_or_view(op) || !(op->flags & GGML_TENSOR_FLAG_COMPUTE)) {
            continue;
        }
        if (!is_sample(op) || op->ne[0] != 1 || op->src[0]->ne[0] != graph->nodes[first]->src[0]->ne[0] ||
            !std::all_of(nodes, nodes + n, [&](const ggml_tensor * other) { return independent(op, other); })) {
            break;
        }
        nodes[n++] = op;
        last       = i;
    }
    if (n < 2) {
        return 0;
    }
    sample_batch batch;
    batch.n_vocab = int32_t(nodes[0]->src[0]->ne[0]);
    for (int i = 0; i < n; i++) {
        batch.rows[i] = row_of(nodes[i], 0);
    }
    launch(ctx, batch, n);
    return last - first;
}

const ggml_ext_cuda_feature ggml_ext_cuda_sample = { applies, compute, fuse };
