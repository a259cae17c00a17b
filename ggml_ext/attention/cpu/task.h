// Inside quantised attention on the CPU: how work and memory are laid out, and one task of it.

#ifndef GGML_EXT_ATTENTION_TASK_CPU_H
#define GGML_EXT_ATTENTION_TASK_CPU_H

#include "attention.h"

#include <stddef.h>

#define GGML_EXT_ATTENTION_ALIGNMENT 64
#define GGML_EXT_LOG2E               1.44269504088896341f

// A task is one kv head of one stream, a block of query tokens and a range of the cache. Where queries are few, the
// range is a chunk of the cache, tasks leave (max, sum, o) and the chunks of a row are merged after a barrier.
// Otherwise it is all of the cache. All of it follows from the shape alone.
struct ggml_ext_attention_plan {
    struct ggml_ext_attention_dims dims;

    int     dk, dv;
    int     heads;       // query heads per task: those that share a head of K and a head of V
    int64_t n_groups;    // of such heads
    int64_t n_queries;   // query tokens
    int64_t n_streams;   // ne[3] of q
    int64_t n_kv;        // cache tokens
    int64_t block;       // query tokens per task
    int64_t n_blocks;
    int64_t chunk;       // cache tokens per task
    int64_t n_chunks;    // 1: no merging
    int     n_rows;      // of a block, a multiple of BATCH
    float   scale, cap;  // cap 0: none
    float   max_bias;
    bool    smooth;
};

// A thread's memory, as the plan's sizes have it.
struct ggml_ext_attention_scratch {
    struct ggml_ext_attention_tile tile;

    int8_t *             q;          // [n_rows][dk_pad]
    int32_t *            q_start;    // [n_rows][k_groups]
    float *              q_scale;    // [n_rows]
    float *              q_bias;     // [n_rows]
    float *              q_floats;   // [n_rows][dk_pad], scaled, for smoothing
    float *              slope;      // [n_rows]
    const ggml_fp16_t ** mask_rows;  // [n_rows], the whole row or NULL
    const ggml_fp16_t ** mask;       // [n_rows], what a tile needs of it
    float *              max;        // [n_rows]
    float *              sum;        // [n_rows][16]
    float *              o;          // [n_rows][dv_pad]
    bool *               skip;       // [n_rows]
    float *              s;          // [BATCH][64]
    float *              alpha;      // [BATCH]
    float *              gamma;      // [BATCH]
    uint8_t *            p;          // [BATCH][v_groups][planes][64]
};

struct ggml_ext_attention_task {
    int64_t stream, group;
    int64_t query, n_queries;
    int64_t begin, end;  // cache tokens
    // What the thread will read next, after all heads of its chunk; empty where that is not known.
    int64_t next_begin, next_end;
};

// For an op that we compute.
struct ggml_ext_attention_plan ggml_ext_attention_make_plan(const struct ggml_tensor * dst);

// Lays the scratch out from base, which may be NULL, and gives its size.
size_t ggml_ext_attention_lay_out(const struct ggml_ext_attention_plan * plan, char * base,
                                  struct ggml_ext_attention_scratch * out);

// Leaves max, sum and o of the task's rows in w. Row r is query r / heads and head r % heads of the group.
void ggml_ext_attention_attend(const struct ggml_ext_attention_plan * plan, const struct ggml_ext_attention_path * path,
                               const struct ggml_tensor * dst, const struct ggml_ext_attention_task * task,
                               struct ggml_ext_attention_scratch * w);

#endif  // GGML_EXT_ATTENTION_TASK_CPU_H
