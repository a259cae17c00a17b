// Quantised attention on the CPU: the driver. Work is split by shape alone and merged in a fixed order, so the
// result does not depend on the number of threads.

#include "attention.h"

#include "core/cpu/override.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "ops.h"
#include "task.h"

#include <math.h>
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

// Merged rows in order of stream, head, query; per chunk: max, sum, o [dv].
static size_t attention_partials_size(const struct ggml_ext_attention_plan * plan) {
    const int64_t n_rows = plan->n_streams * plan->n_groups * plan->heads * plan->n_queries;
    return plan->n_chunks > 1 ? sizeof(float) * n_rows * plan->n_chunks * (2 + plan->dv) : 0;
}

static size_t attention_work_size(const struct ggml_tensor * dst, int n_threads) {
    const struct ggml_ext_attention_plan plan = ggml_ext_attention_make_plan(dst);
    struct ggml_ext_attention_scratch    scratch;
    const size_t ours = GGML_EXT_ATTENTION_ALIGNMENT + ggml_ext_attention_lay_out(&plan, NULL, &scratch) * n_threads +
                        attention_partials_size(&plan);
    // Upstream's row path, for use_ref: three rows and a cache line per thread.
    const size_t reference = sizeof(float) * (plan.dk + 2 * plan.dv + 64) * n_threads;
    return MAX(ours, reference);
}

// --- results ---

static float attention_sum16(const float * x) {
    float sum = 0.0f;
    for (int i = 0; i < 16; i++) {
        sum += x[i];
    }
    return sum;
}

static void attention_write_row(const struct ggml_ext_attention_plan * plan, struct ggml_tensor * dst, int64_t stream,
                                int64_t query, int64_t head, float max, float sum, const float * o) {
    const struct ggml_tensor * sinks = dst->src[4];
    float                      scale = 1.0f;
    if (sinks) {
        const float sink    = ((const float *) sinks->data)[head] * GGML_EXT_LOG2E;
        const float new_max = MAX(max, sink);
        scale               = exp2f(max - new_max);
        sum                 = sum * scale + exp2f(sink - new_max);
    }
    scale = sum == 0.0f ? 0.0f : scale / sum;
    float * out =
        (float *) ((char *) dst->data + ((stream * plan->n_queries + query) * dst->ne[1] + head) * dst->nb[1]);
    for (int i = 0; i < plan->dv; i++) {
        out[i] = o[i] * scale;
    }
}

static float * attention_partial_of(const struct ggml_ext_attention_plan * plan, float * partials, int64_t row,
                                    int64_t chunk) {
    return partials + (row * plan->n_chunks + chunk) * (2 + plan->dv);
}

static void attention_store(const struct ggml_ext_attention_plan * plan, struct ggml_tensor * dst,
                            const struct ggml_ext_attention_task * task, const struct ggml_ext_attention_scratch * w,
                            float * partials) {
    for (int r = 0; r < task->n_queries * plan->heads; r++) {
        const int64_t query = task->query + r / plan->heads;
        const int64_t head  = task->group * plan->heads + r % plan->heads;
        const float   sum   = attention_sum16(w->sum + (size_t) r * 16);
        const float * o     = w->o + (size_t) r * plan->dims.dv_pad;
        if (plan->n_chunks == 1) {
            attention_write_row(plan, dst, task->stream, query, head, w->max[r], sum, o);
            continue;
        }
        const int64_t row = (task->stream * plan->n_groups * plan->heads + head) * plan->n_queries + query;
        float *       out = attention_partial_of(plan, partials, row, task->begin / plan->chunk);
        out[0]            = w->max[r];
        out[1]            = sum;
        memcpy(out + 2, o, sizeof(float) * plan->dv);
    }
}

// Merges a row's chunks in ascending order into the first one and writes the row.
static void attention_merge(const struct ggml_ext_attention_plan * plan, struct ggml_tensor * dst, int64_t row,
                            float * partials) {
    float * into = attention_partial_of(plan, partials, row, 0);
    for (int64_t chunk = 1; chunk < plan->n_chunks; chunk++) {
        const float * from = attention_partial_of(plan, partials, row, chunk);
        const float   max  = MAX(into[0], from[0]);
        if (from[1] == 0.0f) {
            continue;
        }
        const float old_scale = exp2f(into[0] - max);
        const float new_scale = exp2f(from[0] - max);
        into[0]               = max;
        for (int i = 1; i < 2 + plan->dv; i++) {
            into[i] = into[i] * old_scale + from[i] * new_scale;
        }
    }
    const int64_t n_heads = plan->n_groups * plan->heads;
    attention_write_row(plan, dst, row / plan->n_queries / n_heads, row % plan->n_queries,
                        row / plan->n_queries % n_heads, into[0], into[1], into + 2);
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
    const struct ggml_ext_attention_plan   plan = ggml_ext_attention_make_plan(dst);
    const struct ggml_ext_attention_path * path = ggml_ext_attention_fastest();
    struct ggml_ext_attention_scratch      scratch;

    char *       base     = (char *) GGML_PAD((uintptr_t) params->wdata, GGML_EXT_ATTENTION_ALIGNMENT);
    const size_t size     = ggml_ext_attention_lay_out(&plan, NULL, &scratch);
    float *      partials = (float *) (base + size * params->nth);
    ggml_ext_attention_lay_out(&plan, base + size * params->ith, &scratch);
    GGML_ASSERT(params->wsize >= GGML_EXT_ATTENTION_ALIGNMENT + size * params->nth + attention_partials_size(&plan));

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
            ggml_ext_attention_attend(&plan, path, dst, &task, &scratch);
            attention_store(&plan, dst, &task, &scratch, partials);
        }
    }
    if (plan.n_chunks == 1) {
        return;
    }
    ggml_barrier(params->threadpool);
    const int64_t n_rows = plan.n_streams * plan.n_groups * plan.heads * plan.n_queries;
    for (int64_t row = params->ith; row < n_rows; row += params->nth) {
        attention_merge(&plan, dst, row, partials);
    }
}

const struct ggml_ext_cpu_override ggml_ext_cpu_attention = { attention_applies, attention_work_size,
                                                              attention_compute };
