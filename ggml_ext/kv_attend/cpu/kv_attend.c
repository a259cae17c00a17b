// GGML_EXT_OP_KV_ATTEND on the CPU: quantised attention (attention/cpu) over the blocks of lists. A run of a list is a
// tile. Which rows are looked at together follows from shapes and tables alone, so the result does not depend on the
// number of threads; for lists of whole blocks in the order of the cells it has the bits of attention over the cells.

#include "kv_attend/kv_attend.h"

#include "attention/cpu/result.h"
#include "core/cpu/ext_op.h"
#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#include "kv_store/block.h"

#include <stddef.h>
#include <string.h>

// An op's sources and the layout of its blocks.
struct kv_attend_op {
    struct ggml_ext_kv_attend_params p;
    struct ggml_ext_kv_block         block;
    struct ggml_ext_attention_plan   plan;
    const struct ggml_tensor *       pool;
    const struct ggml_tensor *       mask;
    const int32_t *                  offsets;    // [n_lanes * n_lists + 1], in entries
    const struct ggml_ext_kv_entry * entries;
    int64_t                          n_entries;  // that the table has room for
    const int32_t *                  cells;      // [n_lanes][n_positions]
    int64_t                          n_positions, n_lanes;
    const int32_t *                  starts;     // [n_lanes + 1]
    const int32_t *                  tokens;     // [n_tokens], by lane
};

static struct kv_attend_op kv_attend_of(const struct ggml_tensor * dst) {
    const struct ggml_tensor * q = dst->src[0];

    struct kv_attend_op op = {
        .p           = ggml_ext_kv_attend_params_of(dst),
        .pool        = dst->src[1],
        .mask        = dst->src[5],
        .cells       = dst->src[3]->data,
        .n_positions = dst->src[3]->ne[0],
        .n_lanes     = dst->src[3]->ne[1],
        .offsets     = dst->src[2]->data,
        .starts      = dst->src[4]->data,
    };
    const int64_t n_offsets = op.n_lanes * op.p.n_lists + 1;
    op.entries              = (const struct ggml_ext_kv_entry *) (op.offsets + n_offsets);
    op.n_entries            = (dst->src[2]->ne[0] - n_offsets) / 2;
    op.tokens               = op.starts + op.n_lanes + 1;
    op.block =
        ggml_ext_kv_block_of((enum ggml_type) op.p.type_k, op.p.dk, (enum ggml_type) op.p.type_v, op.p.dv, false);

    const struct ggml_ext_attention_shape shape = {
        .type_k    = (enum ggml_type) op.p.type_k,
        .type_v    = (enum ggml_type) op.p.type_v,
        .dk        = op.p.dk,
        .dv        = op.p.dv,
        .n_head    = q->ne[2],
        .n_head_k  = op.p.n_head_kv,
        .n_head_v  = op.p.n_head_kv,
        .n_queries = q->ne[1],
        .n_streams = q->ne[3],
        .n_kv      = op.mask->ne[0],
        .scale     = op.p.scale,
        .max_bias  = op.p.max_bias,
        .cap       = op.p.cap,
    };
    op.plan = ggml_ext_attention_make_plan(&shape);
    return op;
}

static size_t kv_attend_work_size(const struct ggml_tensor * dst, int n_threads) {
    const struct kv_attend_op         op = kv_attend_of(dst);
    struct ggml_ext_attention_scratch scratch;
    return GGML_EXT_ATTENTION_ALIGNMENT + ggml_ext_attention_lay_out(&op.plan, NULL, &scratch) * n_threads +
           ggml_ext_attention_partials_size(&op.plan);
}

// A table over RPC was made by another process.
static void kv_attend_check(const struct kv_attend_op * op) {
    const int64_t n_lists  = op->n_lanes * op->p.n_lists;
    const int64_t n_tokens = op->plan.n_queries * op->plan.n_streams;
    GGML_ASSERT(op->starts[0] == 0 && op->starts[op->n_lanes] == n_tokens && op->offsets[0] == 0 &&
                op->offsets[n_lists] <= op->n_entries && "ggml-ext: kv_attend: the table's sums");
    for (int64_t i = 0; i < op->n_lanes; i++) {
        GGML_ASSERT(op->starts[i] <= op->starts[i + 1] && "ggml-ext: kv_attend: the lanes' tokens");
    }
    for (int64_t i = 0; i < n_tokens; i++) {
        GGML_ASSERT(op->tokens[i] >= 0 && op->tokens[i] < n_tokens && "ggml-ext: kv_attend: a token");
    }
    for (int64_t i = 0; i < n_lists; i++) {
        GGML_ASSERT(op->offsets[i] <= op->offsets[i + 1] && "ggml-ext: kv_attend: the lists' offsets");
    }
}

// What kv_attend_span is given: a task's list.
struct kv_attend_list {
    const struct kv_attend_op *      op;
    const struct ggml_ext_kv_entry * entries;
    int64_t                          n;      // of the list from here on
    const int32_t *                  cells;  // [n_positions], of the lane
    int32_t *                        columns;
};

static const char * kv_attend_block(const struct kv_attend_op * op, const struct ggml_ext_kv_entry * entry) {
    GGML_ASSERT(entry->block >= 0 && entry->block < op->pool->ne[1] && entry->count > 0 &&
                entry->begin + entry->count <= GGML_EXT_KV_SLOTS && "ggml-ext: kv_attend: a run of a block");
    return (const char *) op->pool->data + entry->block * op->pool->nb[1];
}

static struct ggml_ext_attention_span kv_attend_span(const void * cache, const struct ggml_ext_attention_task * task,
                                                     int64_t i) {
    const struct kv_attend_list *    list      = cache;
    const struct kv_attend_op *      op        = list->op;
    const struct ggml_ext_kv_entry * entry     = list->entries + i;
    const char *                     block     = kv_attend_block(op, entry);
    const int32_t *                  positions = (const int32_t *) block + entry->begin;

    bool adjacent = true;
    for (int t = 0; t < entry->count; t++) {
        GGML_ASSERT(positions[t] >= 0 && positions[t] < op->n_positions && "ggml-ext: kv_attend: a position");
        const int32_t cell = list->cells[positions[t]];
        GGML_ASSERT(cell >= 0 && cell < op->plan.n_kv && "ggml-ext: kv_attend: a cell");
        list->columns[t] = cell;
        adjacent &= cell == list->columns[0] + t;
    }
    GGML_UNUSED(task);
    return (struct ggml_ext_attention_span) {
        .k        = block + op->block.k + entry->begin * op->block.k_row,
        .v        = block + op->block.v + entry->begin * op->block.v_row,
        .k_stride = op->block.k_row,
        .v_stride = op->block.v_row,
        .n        = entry->count,
        .column   = list->columns[0],
        .columns  = adjacent ? NULL : list->columns,
    };
}

// The next block's rows, which are adjacent.
static void kv_attend_prefetch(const void * cache, const struct ggml_ext_attention_task * task, int64_t i) {
    const struct kv_attend_list * list = cache;
    GGML_UNUSED(task);
    if (i + 1 >= list->n) {
        return;
    }
    const char * block = kv_attend_block(list->op, list->entries + i + 1);
    for (size_t at = 0; at < list->op->block.size; at += 64) {
        __builtin_prefetch(block + at, 0, 2);
    }
}

static int64_t kv_attend_n_blocks(const struct kv_attend_op * op, int64_t lane) {
    return (op->starts[lane + 1] - op->starts[lane] + op->plan.block - 1) / op->plan.block;
}

// Task i of a lane's: heads come fastest, then chunks, then blocks of query tokens.
static void kv_attend_task(const struct kv_attend_op * op, int64_t lane, int64_t i,
                           const struct ggml_ext_attention_path * path, const struct ggml_ext_attention_result * result,
                           const struct ggml_tensor * q, struct ggml_ext_attention_scratch * scratch) {
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
    const struct kv_attend_list list = {
        .op      = op,
        .entries = op->entries + offsets[0] + task.begin,
        .n       = task.end - task.begin,
        .cells   = op->cells + lane * op->n_positions,
        .columns = columns,
    };
    const struct ggml_ext_attention_tiles tiles = {
        .cache    = &list,
        .n        = list.n,
        .span     = kv_attend_span,
        .prefetch = kv_attend_prefetch,
    };
    ggml_ext_attention_attend(plan, path, q, op->mask, &task, &tiles, scratch);
    ggml_ext_attention_store(plan, &task, chunk, scratch, result);
}

static void kv_attend_compute(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct kv_attend_op              op   = kv_attend_of(dst);
    const struct ggml_ext_attention_path * path = ggml_ext_attention_fastest();
    struct ggml_ext_attention_scratch      scratch;

    char *       base = (char *) GGML_PAD((uintptr_t) params->wdata, GGML_EXT_ATTENTION_ALIGNMENT);
    const size_t size = ggml_ext_attention_lay_out(&op.plan, NULL, &scratch);
    ggml_ext_attention_lay_out(&op.plan, base + size * params->ith, &scratch);
    const struct ggml_ext_attention_result result = {
        .dst      = dst,
        .sinks    = dst->src[6],
        .partials = (float *) (base + size * params->nth),
    };
    if (params->ith == 0) {
        kv_attend_check(&op);
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    const int64_t per_block = op.plan.n_groups * op.plan.n_chunks;
    int64_t       task      = params->ith;  // of all lanes'
    int64_t       before    = 0;            // of the lanes in front
    for (int64_t lane = 0; lane < op.n_lanes; lane++) {
        const int64_t n = kv_attend_n_blocks(&op, lane) * per_block;
        while (task < before + n) {
            kv_attend_task(&op, lane, task - before, path, &result, dst->src[0], &scratch);
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
