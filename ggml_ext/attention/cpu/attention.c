// Quantised attention on the CPU: the driver. Work is split by shape alone and merged in a fixed order, so the
// result does not depend on the number of threads.

#include "attention.h"

#include "core/cpu/override.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "ops.h"
#include "result.h"

#include <stdatomic.h>
#include <string.h>

// --- whether, and how much memory ---

static bool attention_codes(enum ggml_type type) {
    return type == GGML_TYPE_Q8_0 || type == GGML_TYPE_Q4_0 || type == GGML_TYPE_Q5_0 || type == GGML_TYPE_IQ4_NL;
}

// NULL, or why not.
static const char * attention_refusal(const struct ggml_tensor *                dst,
                                      const struct ggml_ext_attention_setting * setting) {
    const struct ggml_tensor * q     = dst->src[0];
    const struct ggml_tensor * k     = dst->src[1];
    const struct ggml_tensor * v     = dst->src[2];
    const struct ggml_tensor * mask  = dst->src[3];
    const struct ggml_tensor * sinks = dst->src[4];
    const struct ggml_tensor * kv[2] = { k, v };
    for (int i = 0; i < 2; i++) {
        if (kv[i]->type == GGML_TYPE_F16 && !setting->f16) {
            return "one of K and V is f16 (GGML_EXT_ATTN=full/f16 includes it)";
        }
        if (!attention_codes(kv[i]->type) && kv[i]->type != GGML_TYPE_F16) {
            return "the type of K or V";
        }
        if (kv[i]->nb[0] != ggml_type_size(kv[i]->type) || kv[i]->ne[0] > GGML_EXT_ATTENTION_MAX_HEAD) {
            return "the layout of K or V";
        }
        if (q->ne[2] % kv[i]->ne[2] != 0 || q->ne[3] % kv[i]->ne[3] != 0 || kv[i]->ne[1] == 0) {
            return "the shape of K or V";
        }
    }
    if (q->type != GGML_TYPE_F32 || q->nb[0] != sizeof(float) || !ggml_is_contiguous(dst) || ggml_nelements(dst) == 0) {
        return "the layout of Q";
    }
    if (mask && (mask->type != GGML_TYPE_F16 || mask->nb[0] != sizeof(ggml_fp16_t) || mask->ne[0] < k->ne[1])) {
        return "the mask";
    }
    if (setting->fast && ggml_ext_attention_fastest() == &ggml_ext_attention_generic) {
        return "no kernels for this processor (GGML_EXT_ATTN=full takes the plain ones)";
    }
    if (sinks && sinks->type != GGML_TYPE_F32) {
        return "the sinks";
    }
    return NULL;
}

static bool attention_applies(const struct ggml_tensor * dst) {
    const struct ggml_ext_attention_setting setting = ggml_ext_attention_setting();
    if (setting.mode == GGML_EXT_ATTENTION_OFF) {
        return false;
    }
    const char * reason = attention_refusal(dst, &setting);
    if (reason == NULL) {
        return true;
    }
    static atomic_flag told      = ATOMIC_FLAG_INIT;
    const bool         quantised = ggml_is_quantized(dst->src[1]->type) || ggml_is_quantized(dst->src[2]->type);
    if (quantised && !atomic_flag_test_and_set(&told)) {
        GGML_LOG_WARN("ggml-ext: attention over K %s [%d] and V %s [%d] is left to llama.cpp's own code: %s\n",
                      ggml_type_name(dst->src[1]->type), (int) dst->src[1]->ne[0], ggml_type_name(dst->src[2]->type),
                      (int) dst->src[2]->ne[0], reason);
    }
    return false;
}

static struct ggml_ext_attention_plan attention_plan_of(const struct ggml_tensor * dst) {
    const struct ggml_tensor * q = dst->src[0];
    const struct ggml_tensor * k = dst->src[1];
    const struct ggml_tensor * v = dst->src[2];

    struct ggml_ext_attention_shape shape = {
        .type_k    = k->type,
        .type_v    = v->type,
        .dk        = (int) k->ne[0],
        .dv        = (int) v->ne[0],
        .n_head    = q->ne[2],
        .n_head_k  = k->ne[2],
        .n_head_v  = v->ne[2],
        .n_queries = q->ne[1],
        .n_streams = q->ne[3],
        .n_kv      = k->ne[1],
    };
    memcpy(&shape.scale, (const float *) dst->op_params + 0, sizeof(float));
    memcpy(&shape.max_bias, (const float *) dst->op_params + 1, sizeof(float));
    memcpy(&shape.cap, (const float *) dst->op_params + 2, sizeof(float));
    return ggml_ext_attention_make_plan(&shape);
}

static size_t attention_work_size(const struct ggml_tensor * dst, int n_threads) {
    const struct ggml_ext_attention_plan plan = attention_plan_of(dst);
    struct ggml_ext_attention_scratch    scratch;
    const size_t ours = GGML_EXT_ATTENTION_ALIGNMENT + ggml_ext_attention_lay_out(&plan, NULL, &scratch) * n_threads +
                        ggml_ext_attention_partials_size(&plan);
    // Upstream's row path, for use_ref: three rows and a cache line per thread.
    const size_t reference = sizeof(float) * (plan.dk + 2 * plan.dv + 64) * n_threads;
    return MAX(ours, reference);
}

// --- a task's tiles ---

// What attention_span and attention_prefetch are given.
struct attention_cache {
    const struct ggml_ext_attention_plan * plan;
    const struct ggml_tensor *             k, *v;
};

static const char * attention_head_rows(const struct ggml_ext_attention_plan * plan,
                                        const struct ggml_ext_attention_task * task, const struct ggml_tensor * x) {
    const int64_t n_head = plan->n_groups * plan->heads;
    return (const char *) x->data + task->group * plan->heads / (n_head / x->ne[2]) * x->nb[2] +
           task->stream / (plan->n_streams / x->ne[3]) * x->nb[3];
}

static struct ggml_ext_attention_span attention_span(const void * cache, const struct ggml_ext_attention_task * task,
                                                     int64_t i) {
    const struct attention_cache * c  = cache;
    const int64_t                  t0 = task->begin + i * GGML_EXT_ATTENTION_TILE;
    return (struct ggml_ext_attention_span) {
        .k        = attention_head_rows(c->plan, task, c->k) + t0 * c->k->nb[1],
        .v        = attention_head_rows(c->plan, task, c->v) + t0 * c->v->nb[1],
        .k_stride = c->k->nb[1],
        .v_stride = c->v->nb[1],
        .n        = (int) MIN(GGML_EXT_ATTENTION_TILE, task->end - t0),
        .column   = t0,
    };
}

// Rows of all heads, or of one, of tokens [begin, end): a head's rows are too far apart for the processor's own
// prefetching.
static void attention_prefetch_rows(const struct ggml_tensor * x, const char * rows, size_t size, int64_t begin,
                                    int64_t end) {
    for (int64_t t = begin; t < end; t++) {
        const char * row = rows + t * x->nb[1];
        for (size_t at = 0; at < size; at += 64) {
            __builtin_prefetch(row + at, 0, 2);
        }
        __builtin_prefetch(row + size - 1, 0, 2);
    }
}

// Where a thread takes a chunk's heads one after another, each tile asks for its share of the next chunk, all heads, so
// that every line is asked for once. Otherwise for the next tile's rows of this head.
static void attention_prefetch_tile(const struct ggml_ext_attention_plan * plan,
                                    const struct ggml_ext_attention_task * task, const struct ggml_tensor * x,
                                    int64_t i) {
    if (task->next_begin == task->next_end) {
        const int64_t next = task->begin + (i + 1) * GGML_EXT_ATTENTION_TILE;
        attention_prefetch_rows(x, attention_head_rows(plan, task, x), ggml_row_size(x->type, x->ne[0]), next,
                                MIN(next + GGML_EXT_ATTENTION_TILE, task->end));
        return;
    }
    const int64_t n_tiles = (task->end - task->begin + GGML_EXT_ATTENTION_TILE - 1) / GGML_EXT_ATTENTION_TILE;
    const int64_t n_steps = n_tiles * plan->n_groups;
    const int64_t step    = task->group * n_tiles + i;
    const int64_t n       = task->next_end - task->next_begin;
    const char *  rows    = (const char *) x->data + task->stream / (plan->n_streams / x->ne[3]) * x->nb[3];
    attention_prefetch_rows(x, rows, x->ne[2] * x->nb[2], task->next_begin + n * step / n_steps,
                            task->next_begin + n * (step + 1) / n_steps);
}

static void attention_prefetch(const void * cache, const struct ggml_ext_attention_task * task, int64_t i) {
    const struct attention_cache * c = cache;
    attention_prefetch_tile(c->plan, task, c->k, i);
    attention_prefetch_tile(c->plan, task, c->v, i);
}

// --- all tasks ---

static void attention_tell_once(const struct ggml_tensor * dst, const struct ggml_ext_attention_path * path) {
    static atomic_flag told = ATOMIC_FLAG_INIT;
    if (!atomic_flag_test_and_set(&told)) {
        GGML_LOG_INFO("ggml-ext: attention over K %s and V %s in 8-bit integers (%s weights, %s); GGML_EXT_ATTN=off "
                      "switches it off\n",
                      ggml_type_name(dst->src[1]->type), ggml_type_name(dst->src[2]->type),
                      ggml_ext_attention_setting().mode == GGML_EXT_ATTENTION_HALF ? "16-bit" : "8-bit", path->name);
    }
}

static struct ggml_ext_attention_task attention_task_of(const struct ggml_ext_attention_plan * plan, int64_t i) {
    const int64_t chunk = i / plan->n_groups % plan->n_chunks;
    const int64_t block = i / plan->n_groups / plan->n_chunks % plan->n_blocks;
    return (struct ggml_ext_attention_task) {
        .stream    = i / plan->n_groups / plan->n_chunks / plan->n_blocks,
        .group     = i % plan->n_groups,
        .query     = block * plan->block,
        .n_queries = MIN(plan->block, plan->n_queries - block * plan->block),
        .begin     = chunk * plan->chunk,
        .end       = MIN(plan->n_kv, (chunk + 1) * plan->chunk),
    };
}

static void attention_compute(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    if (params->use_ref) {
        ggml_compute_forward_flash_attn_ext(params, dst);
        return;
    }
    const struct ggml_ext_attention_plan   plan = attention_plan_of(dst);
    const struct ggml_ext_attention_path * path = ggml_ext_attention_fastest();
    struct ggml_ext_attention_scratch      scratch;

    char *       base = (char *) GGML_PAD((uintptr_t) params->wdata, GGML_EXT_ATTENTION_ALIGNMENT);
    const size_t size = ggml_ext_attention_lay_out(&plan, NULL, &scratch);
    const struct ggml_ext_attention_result result = {
        .dst      = dst,
        .sinks    = dst->src[4],
        .partials = (float *) (base + size * params->nth),
    };
    const struct attention_cache cache = { .plan = &plan, .k = dst->src[1], .v = dst->src[2] };
    ggml_ext_attention_lay_out(&plan, base + size * params->ith, &scratch);
    GGML_ASSERT(params->wsize >=
                GGML_EXT_ATTENTION_ALIGNMENT + size * params->nth + ggml_ext_attention_partials_size(&plan));

    if (params->ith == 0) {
        attention_tell_once(dst, path);
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    // A unit is what a thread takes at once: a task, or with enough chunks all heads of a chunk, whose cache rows are
    // adjacent. It does not matter to the result.
    const struct ggml_tensor * k        = dst->src[1];
    const bool                 adjacent = k->nb[2] < k->nb[1];
    const int64_t              n_ranges = plan.n_streams * plan.n_blocks * plan.n_chunks;  // groups come fastest
    const bool                 whole    = plan.n_chunks > 1 && adjacent && n_ranges >= 4 * (int64_t) params->nth;
    const int64_t              n_units  = whole ? n_ranges : n_ranges * plan.n_groups;
    for (int64_t unit = params->ith, next; unit < n_units; unit = next) {
        next                = ggml_threadpool_chunk_add(params->threadpool, 1);
        const int64_t first = whole ? unit * plan.n_groups : unit;
        const int64_t end   = whole ? first + plan.n_groups : unit + 1;
        for (int64_t i = first; i < end; i++) {
            struct ggml_ext_attention_task task = attention_task_of(&plan, i);
            if (whole && next < n_units) {
                const struct ggml_ext_attention_task after = attention_task_of(&plan, next * plan.n_groups);
                if (after.stream == task.stream) {
                    task.next_begin = after.begin;
                    task.next_end   = after.end;
                }
            }
            const struct ggml_ext_attention_tiles tiles = {
                .cache    = &cache,
                .n        = (task.end - task.begin + GGML_EXT_ATTENTION_TILE - 1) / GGML_EXT_ATTENTION_TILE,
                .span     = attention_span,
                .prefetch = attention_prefetch,
            };
            ggml_ext_attention_attend(&plan, path, dst->src[0], dst->src[3], &task, &tiles, &scratch);
            ggml_ext_attention_store(&plan, &task, task.begin / plan.chunk, &scratch, &result);
        }
    }
    if (plan.n_chunks == 1) {
        return;
    }
    ggml_barrier(params->threadpool);
    ggml_ext_attention_merge(&plan, &result, params->ith, params->nth);
}

const struct ggml_ext_cpu_override ggml_ext_cpu_attention = { attention_applies, attention_work_size,
                                                              attention_compute };
