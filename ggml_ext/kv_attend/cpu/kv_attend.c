// GGML_EXT_OP_KV_ATTEND on the CPU: quantised attention (attention/cpu) over the blocks of lists. A run of a list is a
// tile. Which rows are looked at together follows from shapes and tables alone, so the result does not depend on the
// number of threads; for lists of whole blocks in the order of the cells it has the bits of attention over the cells.
//
// A lane's only token mostly sees all of the lane. Threads look at its row of the mask once, a part each, and if there are
// only zeros no tile looks at it again: behind eviction its columns would be gathered for each head.

#include "attention/cpu/result.h"
#include "core/cpu/ext_op.h"
#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#include "lists.h"

#include <stddef.h>
#include <string.h>

static size_t kv_attend_work_size(const struct ggml_tensor * dst, int n_threads) {
    const struct ggml_ext_kv_lists    op = ggml_ext_kv_lists_of(dst);
    struct ggml_ext_attention_scratch scratch;
    const size_t thread = ggml_ext_attention_lay_out(&op.plan, NULL, &scratch) + ggml_ext_kv_lists_decoded_size(&op);
    return GGML_EXT_ATTENTION_ALIGNMENT + thread * n_threads + ggml_ext_attention_partials_size(&op.plan) +
           (size_t) (n_threads * op.n_lanes);
}

// Whether a lane's row of the mask is looked at beforehand: not where that is more than its lists look at.
static bool kv_attend_asks(const struct ggml_ext_kv_lists * op, int64_t lane) {
    const int32_t * offsets = op->offsets + lane * op->p.n_lists + op->p.first_list;
    const int64_t   n_runs  = offsets[op->plan.n_groups] - offsets[0];
    return op->starts[lane + 1] - op->starts[lane] == 1 && op->mask->ne[2] == 1 &&
           n_runs * GGML_EXT_KV_SLOTS >= op->n_positions;
}

static int64_t kv_attend_n_blocks(const struct ggml_ext_kv_lists * op, int64_t lane) {
    return (op->starts[lane + 1] - op->starts[lane] + op->plan.block - 1) / op->plan.block;
}

// Task i of a lane's, whose mask has only zeros if it is open: heads come fastest, then chunks, then blocks of query tokens.
static void kv_attend_task(const struct ggml_ext_kv_lists * op, int64_t lane, bool open, int64_t i,
                           const struct ggml_ext_attention_path * path, const struct ggml_ext_attention_result * result,
                           const struct ggml_tensor * q, struct ggml_ext_attention_scratch * scratch, char * decoded) {
    const struct ggml_ext_attention_plan * plan  = &op->plan;
    const int64_t                          group = i % plan->n_groups;
    const int64_t                          chunk = i / plan->n_groups % plan->n_chunks;
    const int64_t                          first = op->starts[lane] + i / plan->n_groups / plan->n_chunks * plan->block;
    const int32_t *                        offsets = op->offsets + lane * op->p.n_lists + op->p.first_list + group;
    const int64_t                          n_tiles = offsets[1] - offsets[0];
    // As many whole blocks as a chunk of cells has; more where runs are short.
    const int64_t                          per =
        MAX((plan->chunk + GGML_EXT_KV_SLOTS - 1) / GGML_EXT_KV_SLOTS, (n_tiles + plan->n_chunks - 1) / plan->n_chunks);

    int32_t                        columns[GGML_EXT_KV_SLOTS];
    struct ggml_ext_attention_task task = {
        .group     = group,
        .tokens    = op->tokens + first,
        .n_queries = MIN(plan->block, op->starts[lane + 1] - first),
        .begin     = MIN(n_tiles, chunk * per),
        .end       = MIN(n_tiles, (chunk + 1) * per),
    };
    if (chunk > 0 && task.begin == task.end) {
        ggml_ext_attention_store_nothing(plan, &task, chunk, result);
        return;
    }
    const struct ggml_ext_kv_list list = {
        .op      = op,
        .entries = op->entries + offsets[0] + task.begin,
        .n       = task.end - task.begin,
        .cells   = op->cells + lane * op->n_positions,
        .columns = columns,
        .decoded = decoded,
    };
    const struct ggml_ext_attention_tiles tiles = {
        .cache    = &list,
        .n        = list.n,
        .span     = ggml_ext_kv_lists_span,
        .prefetch = ggml_ext_kv_lists_prefetch,
    };
    ggml_ext_attention_attend(plan, path, q, open ? NULL : op->mask, &task, &tiles, scratch);
    ggml_ext_attention_store(plan, &task, chunk, scratch, result);
}

static void kv_attend_compute(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct ggml_ext_kv_lists         op   = ggml_ext_kv_lists_of(dst);
    const struct ggml_ext_attention_path * path = ggml_ext_attention_fastest();
    struct ggml_ext_attention_scratch      scratch;

    char *       base = (char *) GGML_PAD((uintptr_t) params->wdata, GGML_EXT_ATTENTION_ALIGNMENT);
    const size_t used = ggml_ext_attention_lay_out(&op.plan, NULL, &scratch);
    const size_t size = used + ggml_ext_kv_lists_decoded_size(&op);
    ggml_ext_attention_lay_out(&op.plan, base + size * params->ith, &scratch);
    char *                                 decoded = base + size * params->ith + used;
    const struct ggml_ext_attention_result result  = {
         .dst      = dst,
         .sinks    = dst->src[6],
         .partials = (float *) (base + size * params->nth),
    };
    if (params->ith == 0) {
        ggml_ext_kv_lists_check(&op);
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    bool * sees = (bool *) result.partials + ggml_ext_attention_partials_size(&op.plan);  // [nth][n_lanes]
    for (int64_t lane = 0; lane < op.n_lanes; lane++) {
        sees[params->ith * op.n_lanes + lane] =
            kv_attend_asks(&op, lane) && ggml_ext_kv_lists_sees(&op, lane, params->ith, params->nth);
    }
    ggml_barrier(params->threadpool);

    const int64_t per_block = op.plan.n_groups * op.plan.n_chunks;
    int64_t       task      = params->ith;  // of all lanes'
    int64_t       before    = 0;            // of the lanes in front
    for (int64_t lane = 0; lane < op.n_lanes; lane++) {
        const int64_t n    = kv_attend_n_blocks(&op, lane) * per_block;
        bool          open = true;
        for (int i = 0; i < params->nth; i++) {
            open = open && sees[i * op.n_lanes + lane];
        }
        while (task < before + n) {
            kv_attend_task(&op, lane, open, task - before, path, &result, dst->src[0], &scratch, decoded);
            task = ggml_threadpool_chunk_add(params->threadpool, 1);
        }
        before += n;
    }
    if (op.plan.n_chunks > 1) {
        ggml_barrier(params->threadpool);
        ggml_ext_attention_merge(&op.plan, &result, params->ith, params->nth);
    }
}

const struct ggml_ext_cpu_op ggml_ext_cpu_kv_attend = { kv_attend_compute, NULL, kv_attend_work_size };
