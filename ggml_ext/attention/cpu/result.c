// Quantised attention on the CPU: rows of the result, merged in a fixed order.

#include "result.h"

#include "ggml-impl.h"

#include <math.h>
#include <string.h>

static int64_t attention_n_heads(const struct ggml_ext_attention_plan * plan) {
    return plan->n_groups * plan->heads;
}

static int64_t attention_n_rows(const struct ggml_ext_attention_plan * plan) {
    return plan->n_streams * plan->n_queries * attention_n_heads(plan);
}

// Rows in the order of dst, token then head; per chunk: max, sum, o [dv].
size_t ggml_ext_attention_partials_size(const struct ggml_ext_attention_plan * plan) {
    return plan->n_chunks > 1 ? sizeof(float) * attention_n_rows(plan) * plan->n_chunks * (2 + plan->dv) : 0;
}

static float * attention_partial_of(const struct ggml_ext_attention_plan *   plan,
                                    const struct ggml_ext_attention_result * result, int64_t row, int64_t chunk) {
    return result->partials + (row * plan->n_chunks + chunk) * (2 + plan->dv);
}

// The row of a task's row r.
static int64_t attention_row_of(const struct ggml_ext_attention_plan * plan,
                                const struct ggml_ext_attention_task * task, int r) {
    const int64_t token = ggml_ext_attention_token(plan, task, r / plan->heads);
    return token * attention_n_heads(plan) + task->group * plan->heads + r % plan->heads;
}

static float attention_sum16(const float * x) {
    float sum = 0.0f;
    for (int i = 0; i < 16; i++) {
        sum += x[i];
    }
    return sum;
}

static void attention_write_row(const struct ggml_ext_attention_plan *   plan,
                                const struct ggml_ext_attention_result * result, int64_t row, float max, float sum,
                                const float * o) {
    float scale = 1.0f;
    if (result->sinks) {
        const float sink    = ((const float *) result->sinks->data)[row % attention_n_heads(plan)] * GGML_EXT_LOG2E;
        const float new_max = MAX(max, sink);
        scale               = exp2f(max - new_max);
        sum                 = sum * scale + exp2f(sink - new_max);
    }
    scale       = sum == 0.0f ? 0.0f : scale / sum;
    float * out = (float *) ((char *) result->dst->data + row * result->dst->nb[1]);
    for (int i = 0; i < plan->dv; i++) {
        out[i] = o[i] * scale;
    }
}

void ggml_ext_attention_store(const struct ggml_ext_attention_plan * plan, const struct ggml_ext_attention_task * task,
                              int64_t chunk, const struct ggml_ext_attention_scratch * w,
                              const struct ggml_ext_attention_result * result) {
    for (int r = 0; r < task->n_queries * plan->heads; r++) {
        const int64_t row = attention_row_of(plan, task, r);
        const float   sum = attention_sum16(w->sum + (size_t) r * 16);
        const float * o   = w->o + (size_t) r * plan->dims.dv_pad;
        if (plan->n_chunks == 1) {
            attention_write_row(plan, result, row, w->max[r], sum, o);
            continue;
        }
        float * out = attention_partial_of(plan, result, row, chunk);
        out[0]      = w->max[r];
        out[1]      = sum;
        memcpy(out + 2, o, sizeof(float) * plan->dv);
    }
}

void ggml_ext_attention_store_nothing(const struct ggml_ext_attention_plan * plan,
                                      const struct ggml_ext_attention_task * task, int64_t chunk,
                                      const struct ggml_ext_attention_result * result) {
    for (int r = 0; r < task->n_queries * plan->heads; r++) {
        float * out = attention_partial_of(plan, result, attention_row_of(plan, task, r), chunk);
        out[0]      = -INFINITY;
        out[1]      = 0.0f;
    }
}

static void attention_merge_row(const struct ggml_ext_attention_plan *   plan,
                                const struct ggml_ext_attention_result * result, int64_t row) {
    float * into = attention_partial_of(plan, result, row, 0);
    for (int64_t chunk = 1; chunk < plan->n_chunks; chunk++) {
        const float * from = attention_partial_of(plan, result, row, chunk);
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
    attention_write_row(plan, result, row, into[0], into[1], into + 2);
}

void ggml_ext_attention_merge(const struct ggml_ext_attention_plan *   plan,
                              const struct ggml_ext_attention_result * result, int ith, int nth) {
    for (int64_t row = ith; row < attention_n_rows(plan); row += nth) {
        attention_merge_row(plan, result, row);
    }
}
