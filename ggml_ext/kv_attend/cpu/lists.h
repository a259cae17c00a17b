// What sub-ops that look at lists of blocks share: their sources, and a run of a list as a tile of attention.

#ifndef GGML_EXT_KV_LISTS_CPU_H
#define GGML_EXT_KV_LISTS_CPU_H

#include "attention/cpu/task.h"
#include "kv_attend/kv_attend.h"
#include "kv_code/cpu/cold.h"
#include "kv_store/block.h"

// An op's sources and the layout of its blocks.
struct ggml_ext_kv_lists {
    struct ggml_ext_kv_attend_params p;
    struct ggml_ext_kv_block         block;
    struct ggml_ext_attention_plan   plan;
    struct ggml_ext_kv_cold          cold;
    const struct ggml_tensor *       pool;
    const struct ggml_tensor *       codes;      // their pool, NULL: none
    const struct ggml_tensor *       mask;
    const int32_t *                  offsets;    // [n_lanes * n_lists + 1], in entries
    const struct ggml_ext_kv_entry * entries;
    int64_t                          n_entries;  // that the table has room for
    const int32_t *                  cells;      // [n_lanes][n_positions]
    int64_t                          n_positions, n_lanes;
    const int32_t *                  starts;     // [n_lanes + 1]
    const int32_t *                  tokens;     // [n_tokens], by lane
};

// What ggml_ext_kv_lists_span is given: a task's list.
struct ggml_ext_kv_list {
    const struct ggml_ext_kv_lists * op;
    const struct ggml_ext_kv_entry * entries;
    int64_t                          n;        // of the list from here on
    const int32_t *                  cells;    // [n_positions], of the lane
    int32_t *                        columns;
    char *                           decoded;  // of ggml_ext_kv_lists_decoded_size bytes; NULL without codes
};

// What a tile of codes is decoded into.
size_t ggml_ext_kv_lists_decoded_size(const struct ggml_ext_kv_lists * op);

// Of a tensor with kv_attend's sources and, first among its own, kv_attend's parameters.
struct ggml_ext_kv_lists ggml_ext_kv_lists_of(const struct ggml_tensor * dst);

// Aborts for a table that does not hold together: over RPC it was made by another process.
void ggml_ext_kv_lists_check(const struct ggml_ext_kv_lists * op);

// Whether a lane's only token has a 0 of the mask in the ith of n parts of the lane's cells, all of which are the mask's.
bool ggml_ext_kv_lists_sees(const struct ggml_ext_kv_lists * op, int64_t lane, int ith, int n);

// A run's block, which begins with positions. Aborts for one that is in no pool.
const char * ggml_ext_kv_lists_block(const struct ggml_ext_kv_lists * op, const struct ggml_ext_kv_entry * entry);

// For ggml_ext_attention_tiles, whose cache is a struct ggml_ext_kv_list. Aborts for a position or a cell that is none.
struct ggml_ext_attention_span ggml_ext_kv_lists_span(const void * cache, const struct ggml_ext_attention_task * task,
                                                      int64_t i);

// The next block's rows, which are adjacent.
void ggml_ext_kv_lists_prefetch(const void * cache, const struct ggml_ext_attention_task * task, int64_t i);

#endif  // GGML_EXT_KV_LISTS_CPU_H
