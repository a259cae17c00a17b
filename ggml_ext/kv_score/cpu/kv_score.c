// GGML_EXT_OP_KV_SCORE on the CPU: quantised attention (attention/cpu) of a lane's latest queries, twice over its lists:
// first for each row's log of the sum of exponentials, then for the squares of its probabilities. Threads share the heads
// and chunks of the lists; lanes that share slots come one after the other. No order depends on the number of threads.

#include "kv_score/kv_score.h"

#include "core/cpu/ext_op.h"
#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#include "kv_attend/cpu/lists.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

#define CHUNKS     32  // of a list, at most
#define MIN_CHUNK  4   // tiles
#define FEW        4   // a lane of fewer than window / FEW queries is left alone
#define TILE       GGML_EXT_KV_SLOTS
#define HALF_LEVEL 65535.0f

// The op, and what its threads share.
struct kv_score_op {
    struct ggml_ext_kv_score_params   p;
    struct ggml_ext_kv_lists          lists;
    const struct ggml_tensor *        q;
    const struct ggml_tensor *        sinks;
    const struct ggml_tensor *        dst;
    float *                           partials;  // [n_groups][CHUNKS][n_rows][2]: max, sum
    struct ggml_ext_attention_scratch scratch;   // a thread's own
    float *                           sums;      // [tiles of a chunk][TILE], a thread's own
};

static int64_t kv_score_tiles_per_chunk(int64_t n_tiles) {
    return MAX(MIN_CHUNK, (n_tiles + CHUNKS - 1) / CHUNKS);
}

static size_t kv_score_sums_size(const struct ggml_ext_kv_lists * lists) {
    return sizeof(float) * TILE * kv_score_tiles_per_chunk(lists->n_entries);
}

static size_t kv_score_partials_size(const struct ggml_ext_attention_plan * plan) {
    return sizeof(float) * plan->n_groups * CHUNKS * plan->n_rows * 2;
}

// A plan of one block of queries, without V. Weights have 16 bits.
static struct kv_score_op kv_score_of(const struct ggml_tensor * dst) {
    struct kv_score_op op = {
        .p     = ggml_ext_kv_score_params_of(dst),
        .lists = ggml_ext_kv_lists_of(dst),
        .q     = dst->src[0],
        .sinks = dst->src[6],
        .dst   = dst,
    };
    struct ggml_ext_attention_plan * plan = &op.lists.plan;
    plan->dims.planes                     = 2;
    plan->dims.v_groups                   = 1;
    plan->dims.dv_pad                     = GGML_EXT_ATTENTION_GROUP;
    plan->block                           = MIN(op.p.window, plan->n_queries * plan->n_streams);
    plan->n_rows                          = (int) GGML_PAD(plan->block * plan->heads, GGML_EXT_ATTENTION_BATCH);
    return op;
}

static size_t kv_score_work_size(const struct ggml_tensor * dst, int n_threads) {
    struct kv_score_op op     = kv_score_of(dst);
    const size_t       thread = ggml_ext_attention_lay_out(&op.lists.plan, NULL, &op.scratch) +
                          GGML_PAD(kv_score_sums_size(&op.lists), GGML_EXT_ATTENTION_ALIGNMENT);
    return GGML_EXT_ATTENTION_ALIGNMENT + thread * n_threads + kv_score_partials_size(&op.lists.plan);
}

static void kv_score_lay_out(struct kv_score_op * op, const struct ggml_compute_params * params) {
    char *       base    = (char *) GGML_PAD((uintptr_t) params->wdata, GGML_EXT_ATTENTION_ALIGNMENT);
    const size_t scratch = ggml_ext_attention_lay_out(&op->lists.plan, NULL, &op->scratch);
    const size_t thread  = scratch + GGML_PAD(kv_score_sums_size(&op->lists), GGML_EXT_ATTENTION_ALIGNMENT);
    char *       mine    = base + thread * params->ith;
    ggml_ext_attention_lay_out(&op->lists.plan, mine, &op->scratch);
    op->sums     = (float *) (mine + scratch);
    op->partials = (float *) (base + thread * params->nth);
}

static float * kv_score_partial_of(const struct kv_score_op * op, int64_t group, int64_t chunk, int row) {
    return op->partials + 2 * ((group * CHUNKS + chunk) * op->lists.plan.n_rows + row);
}

// A chunk of the tiles of a lane's list.
struct kv_score_chunk {
    struct ggml_ext_attention_task  task;
    struct ggml_ext_kv_list         list;
    struct ggml_ext_attention_tiles tiles;
    int64_t                         group, chunk;
    int32_t                         last;  // position of the list's end
    int32_t                         columns[TILE];
};

static void kv_score_take(const struct kv_score_op * op, int64_t lane, int64_t i, struct kv_score_chunk * out) {
    const struct ggml_ext_kv_lists * lists   = &op->lists;
    const int64_t                    group   = i % lists->plan.n_groups;
    const int64_t                    chunk   = i / lists->plan.n_groups;
    const int32_t *                  offsets = lists->offsets + lane * lists->p.n_lists + lists->p.first_list + group;
    const int64_t                    n_tiles = offsets[1] - offsets[0];
    const int64_t                    per     = kv_score_tiles_per_chunk(n_tiles);
    const int64_t                    end     = lists->starts[lane + 1];
    const int64_t                    n       = MIN(lists->plan.block, end - lists->starts[lane]);

    out->group = group;
    out->chunk = chunk;
    out->task  = (struct ggml_ext_attention_task) {
         .group     = group,
         .tokens    = lists->tokens + end - n,
         .n_queries = n,
         .begin     = MIN(n_tiles, chunk * per),
         .end       = MIN(n_tiles, (chunk + 1) * per),
    };
    out->list = (struct ggml_ext_kv_list) {
        .op      = lists,
        .entries = lists->entries + offsets[0] + out->task.begin,
        .n       = out->task.end - out->task.begin,
        .cells   = lists->cells + lane * lists->n_positions,
        .columns = out->columns,
    };
    out->tiles = (struct ggml_ext_attention_tiles) {
        .cache    = &out->list,
        .n        = out->list.n,
        .span     = ggml_ext_kv_lists_span,
        .prefetch = ggml_ext_kv_lists_prefetch,
    };
    out->last = -1;
    if (n_tiles > 0) {
        const struct ggml_ext_kv_entry * tail = lists->entries + offsets[1] - 1;
        out->last = ((const int32_t *) ggml_ext_kv_lists_block(lists, tail))[tail->begin + tail->count - 1];
    }
}

static void kv_score_nothing(const struct ggml_ext_attention_use * use, const struct ggml_ext_attention_plan * plan,
                             const struct ggml_ext_attention_path * path, const struct ggml_ext_attention_tile * tile,
                             const struct ggml_ext_attention_rows * rows, int64_t i, int row) {
    GGML_UNUSED(use);
    GGML_UNUSED(plan);
    GGML_UNUSED(path);
    GGML_UNUSED(tile);
    GGML_UNUSED(rows);
    GGML_UNUSED(i);
    GGML_UNUSED(row);
}

// Each row's maximum and sum over the chunk; a sum of NaN for a row that is not finite.
static void kv_score_normalise(struct kv_score_op * op, const struct ggml_ext_attention_path * path,
                               struct kv_score_chunk * c) {
    const struct ggml_ext_attention_plan * plan = &op->lists.plan;
    struct ggml_ext_attention_scratch *    w    = &op->scratch;
    const struct ggml_ext_attention_use    use  = { .batch = kv_score_nothing };

    if (c->list.n > 0) {
        ggml_ext_attention_load_queries(plan, path, op->q, op->lists.mask, &c->task, w);
        ggml_ext_attention_weigh(plan, path, &c->task, &c->tiles, &use, w);
    }
    for (int r = 0; r < c->task.n_queries * plan->heads; r++) {
        float * out = kv_score_partial_of(op, c->group, c->chunk, r);
        if (c->list.n == 0) {
            out[0] = -INFINITY;
            out[1] = 0.0f;
            continue;
        }
        out[0] = w->max[r];
        out[1] = w->o[(size_t) r * plan->dims.dv_pad];  // 0, or NaN
        for (int i = 0; i < 16; i++) {
            out[1] += w->sum[(size_t) r * 16 + i];
        }
    }
}

// log2 of a row's sum of exponentials over all chunks; +Inf, which leaves no probability, for a row without one.
static float kv_score_log_sum(const struct kv_score_op * op, int64_t group, int row) {
    const int64_t head = group * op->lists.plan.heads + row % op->lists.plan.heads;
    float         max  = -INFINITY;
    float         sink = op->sinks ? ((const float *) op->sinks->data)[head] * GGML_EXT_LOG2E : -INFINITY;
    for (int64_t chunk = 0; chunk < CHUNKS; chunk++) {
        max = MAX(max, kv_score_partial_of(op, group, chunk, row)[0]);
    }
    max       = MAX(max, sink);
    float sum = sink > -INFINITY ? exp2f(sink - max) : 0.0f;
    for (int64_t chunk = 0; chunk < CHUNKS; chunk++) {
        const float * partial = kv_score_partial_of(op, group, chunk, row);
        if (partial[1] != 0.0f) {
            sum += partial[1] * exp2f(partial[0] - max);
        }
    }
    const float result = max + log2f(sum);
    return sum > 0.0f && isfinite(result) ? result : INFINITY;
}

struct kv_score_squares {
    float * sums;
    float   unit;  // of the result: 1 / queries
};

// Adds the squares of a batch's probabilities: weight * gamma / level.
static void kv_score_square(const struct ggml_ext_attention_use * use, const struct ggml_ext_attention_plan * plan,
                            const struct ggml_ext_attention_path * path, const struct ggml_ext_attention_tile * tile,
                            const struct ggml_ext_attention_rows * rows, int64_t i, int row) {
    const struct kv_score_squares * squares = use->context;
    float *                         sums    = squares->sums + i * TILE;
    for (int r = 0; r < rows->n_rows; r++) {
        const float gamma = rows->gamma[r] / HALF_LEVEL;
        if (!(gamma > 0.0f)) {
            continue;
        }
        const uint8_t * high = rows->p + (size_t) r * 2 * TILE;
        const float     unit = squares->unit * gamma * gamma;
        for (int at = 0; at < TILE; at++) {
            const float weight = (float) (high[at] << 8 | high[at + TILE]);
            sums[at] += unit * weight * weight;
        }
    }
    GGML_UNUSED(plan);
    GGML_UNUSED(path);
    GGML_UNUSED(tile);
    GGML_UNUSED(row);
}

// The place of a tile's token among its weights: quad j holds tokens 16 (j mod 4) + 4 (j / 4) + 0 .. 3.
static int kv_score_place(int token) {
    return 4 * (token / 4 % 4 * 4 + token / 16) + token % 4;
}

static void kv_score_update(const struct kv_score_op * op, const struct kv_score_chunk * c) {
    for (int64_t i = 0; i < c->list.n; i++) {
        const struct ggml_ext_kv_entry * entry = c->list.entries + i;

        const int32_t * positions = (const int32_t *) ggml_ext_kv_lists_block(&op->lists, entry) + entry->begin;
        char *          block     = (char *) op->dst->data + entry->block * op->dst->nb[1];
        float *         scores    = (float *) (block + op->p.score) + entry->begin;
        for (int t = 0; t < entry->count && positions[t] <= c->last - op->p.recent; t++) {
            const float seen = op->sums[i * TILE + kv_score_place(t)];
            scores[t]        = scores[t] == INFINITY ? seen : MAX(op->p.decay * scores[t], seen);
        }
    }
}

static void kv_score_add(struct kv_score_op * op, const struct ggml_ext_attention_path * path,
                         struct kv_score_chunk * c) {
    const struct ggml_ext_attention_plan * plan = &op->lists.plan;
    struct ggml_ext_attention_scratch *    w    = &op->scratch;
    if (c->list.n == 0) {
        return;
    }
    struct kv_score_squares             squares = { op->sums, 1.0f / (float) c->task.n_queries };
    const struct ggml_ext_attention_use use     = { .batch = kv_score_square, .context = &squares };
    memset(op->sums, 0, sizeof(float) * TILE * c->list.n);
    ggml_ext_attention_load_queries(plan, path, op->q, op->lists.mask, &c->task, w);
    for (int r = 0; r < c->task.n_queries * plan->heads; r++) {
        w->max[r] = kv_score_log_sum(op, c->group, r);
    }
    ggml_ext_attention_weigh(plan, path, &c->task, &c->tiles, &use, w);
    kv_score_update(op, c);
}

static void kv_score_compute(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    struct kv_score_op                     op   = kv_score_of(dst);
    const struct ggml_ext_attention_path * path = ggml_ext_attention_fastest();
    kv_score_lay_out(&op, params);
    if (params->ith == 0) {
        ggml_ext_kv_lists_check(&op.lists);
    }
    const int64_t n = op.lists.plan.n_groups * CHUNKS;
    for (int64_t lane = 0; lane < op.lists.n_lanes; lane++) {
        ggml_barrier(params->threadpool);
        if (FEW * (op.lists.starts[lane + 1] - op.lists.starts[lane]) < op.p.window) {
            continue;
        }
        struct kv_score_chunk c;
        for (int64_t i = params->ith; i < n; i += params->nth) {
            kv_score_take(&op, lane, i, &c);
            kv_score_normalise(&op, path, &c);
        }
        ggml_barrier(params->threadpool);
        for (int64_t i = params->ith; i < n; i += params->nth) {
            kv_score_take(&op, lane, i, &c);
            kv_score_add(&op, path, &c);
        }
    }
}

const struct ggml_ext_cpu_op ggml_ext_cpu_kv_score = { kv_score_compute, NULL, kv_score_work_size };
