// Inside quantised attention on the CPU: how work and memory are laid out, and one task of it.

#ifndef GGML_EXT_ATTENTION_TASK_CPU_H
#define GGML_EXT_ATTENTION_TASK_CPU_H

#include "attention.h"

#include <stddef.h>

#define GGML_EXT_ATTENTION_ALIGNMENT 64
#define GGML_EXT_LOG2E               1.44269504088896341f

struct ggml_ext_attention_shape {
    enum ggml_type type_k, type_v;
    int            dk, dv;                // channels of a head
    int64_t        n_head, n_head_k, n_head_v;
    int64_t        n_queries, n_streams;  // ne[1] and ne[3] of q
    int64_t        n_kv;                  // columns of the mask
    int64_t        n_keys;                // that a query looks at, at most; 0: n_kv
    float          scale, max_bias, cap;  // cap 0: none
    int            rows;                  // that a task takes at most, where a tile is dear; 0: as many as is best else
};

// A task is one kv head, a block of query tokens and a range of the cache. Where queries are few, the range is a chunk
// of the cache, tasks leave (max, sum, o) and the chunks of a row are merged after a barrier. Otherwise it is all of
// the cache. All of it follows from the shape alone.
struct ggml_ext_attention_plan {
    struct ggml_ext_attention_dims dims;

    enum ggml_type type_k, type_v;

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
    ggml_fp16_t *        gathered;   // [n_rows][64], of a tile whose columns of the mask are not adjacent
    bool *               skip;       // [n_rows]
    float *              s;          // [BATCH][64]
    float *              alpha;      // [BATCH]
    float *              gamma;      // [BATCH]
    uint8_t *            p;          // [BATCH][v_groups][planes][64]
};

struct ggml_ext_attention_task {
    int64_t         stream, group;
    int64_t         query, n_queries;
    const int32_t * tokens;      // the query tokens, of all streams; NULL: the stream's from `query` on
    int64_t         begin, end;  // cache tokens or tiles, as the task's tiles count them
    // What the thread will read next, after all heads of its chunk; empty where that is not known.
    int64_t         next_begin, next_end;
};

// At most 64 cache tokens that are looked at together.
struct ggml_ext_attention_span {
    const char *    k, *v;  // the first token's rows
    size_t          k_stride, v_stride;
    int             n;
    int64_t         column;   // of the mask, of the first token
    const int32_t * columns;  // of each token, below the mask's ne[0]; NULL: the next ones from `column` on
};

// The cache tokens of a task.
struct ggml_ext_attention_tiles {
    const void * cache;
    int64_t      n;
    struct ggml_ext_attention_span (*span)(const void * cache, const struct ggml_ext_attention_task * task, int64_t i);
    // Called before tile i is read; NULL: nothing to do.
    void (*prefetch)(const void * cache, const struct ggml_ext_attention_task * task, int64_t i);
};

struct ggml_ext_attention_plan ggml_ext_attention_make_plan(const struct ggml_ext_attention_shape * shape);

// Lays the scratch out from base, which may be NULL, and gives its size.
size_t ggml_ext_attention_lay_out(const struct ggml_ext_attention_plan * plan, char * base,
                                  struct ggml_ext_attention_scratch * out);

// Query token j of a task: query token / n_queries' stream, token % n_queries in it.
static inline int64_t ggml_ext_attention_token(const struct ggml_ext_attention_plan * plan,
                                               const struct ggml_ext_attention_task * task, int64_t j) {
    return task->tokens ? task->tokens[j] : task->stream * plan->n_queries + task->query + j;
}

// What is done with a batch of rows' weights on a tile.
struct ggml_ext_attention_use {
    // tile i of the task's; rows: the batch that begins with row `row`. Not called where the mask hides all of the tile.
    void (*batch)(const struct ggml_ext_attention_use * use, const struct ggml_ext_attention_plan * plan,
                  const struct ggml_ext_attention_path * path, const struct ggml_ext_attention_tile * tile,
                  const struct ggml_ext_attention_rows * rows, int64_t i, int row);
    void * context;
    bool   values;  // the tile has V; else v_level is the planes' largest weight, for each token
};

// The task's queries, with max -inf, sum and o 0, for weigh.
void ggml_ext_attention_load_queries(const struct ggml_ext_attention_plan * plan,
                                     const struct ggml_ext_attention_path * path, const struct ggml_tensor * q,
                                     const struct ggml_tensor * mask, const struct ggml_ext_attention_task * task,
                                     struct ggml_ext_attention_scratch * w);

// Weights of the task's rows on each of its tiles, with running max and sum in w. Arguments as of attend.
void ggml_ext_attention_weigh(const struct ggml_ext_attention_plan * plan, const struct ggml_ext_attention_path * path,
                              const struct ggml_ext_attention_task *  task,
                              const struct ggml_ext_attention_tiles * tiles, const struct ggml_ext_attention_use * use,
                              struct ggml_ext_attention_scratch * w);

// Leaves max, sum and o of the task's rows in w. Row r is query token r / heads and head r % heads of the group.
// q: F32 [dk, n_queries, n_head, n_streams]; mask: F16 [>= n_kv, n_queries, *, *] or NULL.
void ggml_ext_attention_attend(const struct ggml_ext_attention_plan * plan, const struct ggml_ext_attention_path * path,
                               const struct ggml_tensor * q, const struct ggml_tensor * mask,
                               const struct ggml_ext_attention_task *  task,
                               const struct ggml_ext_attention_tiles * tiles, struct ggml_ext_attention_scratch * w);

#endif  // GGML_EXT_ATTENTION_TASK_CPU_H
