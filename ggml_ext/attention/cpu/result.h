// Inside quantised attention on the CPU: from tasks' (max, sum, o) to rows of the result.

#ifndef GGML_EXT_ATTENTION_RESULT_CPU_H
#define GGML_EXT_ATTENTION_RESULT_CPU_H

#include "task.h"

// Where the rows of an op go.
struct ggml_ext_attention_result {
    struct ggml_tensor *       dst;       // F32 [dv, n_head, n_queries, n_streams], contiguous
    const struct ggml_tensor * sinks;     // F32 [n_head] or NULL
    float *                    partials;  // of ggml_ext_attention_partials_size bytes, where chunks are merged
};

size_t ggml_ext_attention_partials_size(const struct ggml_ext_attention_plan * plan);

// A task's rows: to dst, or as chunk `chunk` of them to partials.
void ggml_ext_attention_store(const struct ggml_ext_attention_plan * plan, const struct ggml_ext_attention_task * task,
                              int64_t chunk, const struct ggml_ext_attention_scratch * w,
                              const struct ggml_ext_attention_result * result);

// The same of a chunk that has no keys.
void ggml_ext_attention_store_nothing(const struct ggml_ext_attention_plan * plan,
                                      const struct ggml_ext_attention_task * task, int64_t chunk,
                                      const struct ggml_ext_attention_result * result);

// Merges the chunks of rows ith, ith + nth, ... into dst, once all of them are stored.
void ggml_ext_attention_merge(const struct ggml_ext_attention_plan *   plan,
                              const struct ggml_ext_attention_result * result, int ith, int nth);

#endif  // GGML_EXT_ATTENTION_RESULT_CPU_H
