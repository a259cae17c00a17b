#include "lists.h"

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"

// A run of codes is decoded once for so many rows: decoding takes as long as attending 64 of them.
#define ROWS_OF_CODES 256

struct ggml_ext_kv_lists ggml_ext_kv_lists_of(const struct ggml_tensor * dst) {
    const struct ggml_tensor * q = dst->src[0];

    struct ggml_ext_kv_lists op = {
        .p           = ggml_ext_kv_attend_params_of(dst),
        .pool        = dst->src[1],
        .codes       = dst->src[7],
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

    if (op.codes != NULL) {
        const struct ggml_ext_kv_cold_params cold = ggml_ext_kv_attend_cold_of(dst);
        op.cold = ggml_ext_kv_cold_of(&cold, op.p.dk, op.p.dv, op.codes, dst->src[8], dst->src[9]);
    }

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
        .n_keys    = op.p.n_keys,
        .scale     = op.p.scale,
        .max_bias  = op.p.max_bias,
        .cap       = op.p.cap,
        .rows      = op.codes ? ROWS_OF_CODES : 0,
    };
    op.plan = ggml_ext_attention_make_plan(&shape);
    return op;
}

void ggml_ext_kv_lists_check(const struct ggml_ext_kv_lists * op) {
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

bool ggml_ext_kv_lists_sees(const struct ggml_ext_kv_lists * op, int64_t lane, int ith, int n) {
    const struct ggml_tensor * mask  = op->mask;
    const int64_t              token = op->tokens[op->starts[lane]];
    const uint16_t * row   = (const uint16_t *) ((const char *) mask->data + token % op->plan.n_queries * mask->nb[1] +
                                               token / op->plan.n_queries % mask->ne[3] * mask->nb[3]);
    const int32_t *  cells = op->cells + lane * op->n_positions;
    const int64_t    begin = op->n_positions * ith / n, end = op->n_positions * (ith + 1) / n;

    int32_t last = -1;
    for (int64_t p = begin; p < end; p++) {
        last = MAX(last, cells[p]);
    }
    if (last >= op->plan.n_kv) {
        return false;
    }
    uint16_t ones = 0;
    for (int64_t p = begin; p < end; p++) {
        const uint16_t held = cells[p] < 0 ? 0 : 0xffff;  // positions that the lane lacks have no cell
        ones |= row[MAX(cells[p], 0)] & held;
    }
    return ones == 0;
}

size_t ggml_ext_kv_lists_decoded_size(const struct ggml_ext_kv_lists * op) {
    const size_t slot = op->p.dk * sizeof(float) + op->block.k_row + op->block.v_row;
    return op->codes ? GGML_PAD(GGML_EXT_KV_SLOTS * slot, GGML_EXT_ATTENTION_ALIGNMENT) : 0;
}

// Blocks of codes come behind the pool's.
static bool kv_lists_are_codes(const struct ggml_ext_kv_lists * op, const struct ggml_ext_kv_entry * entry) {
    return op->codes != NULL && entry->block >= op->pool->ne[1];
}

const char * ggml_ext_kv_lists_block(const struct ggml_ext_kv_lists * op, const struct ggml_ext_kv_entry * entry) {
    const bool                 codes = kv_lists_are_codes(op, entry);
    const struct ggml_tensor * pool  = codes ? op->codes : op->pool;
    const int64_t              block = entry->block - (codes ? op->pool->ne[1] : 0);
    GGML_ASSERT(block >= 0 && block < pool->ne[1] && entry->count > 0 &&
                entry->begin + entry->count <= GGML_EXT_KV_SLOTS && "ggml-ext: kv_attend: a run of a block");
    return (const char *) pool->data + block * pool->nb[1];
}

struct ggml_ext_attention_span ggml_ext_kv_lists_span(const void * cache, const struct ggml_ext_attention_task * task,
                                                      int64_t i) {
    const struct ggml_ext_kv_list *  list      = cache;
    const struct ggml_ext_kv_lists * op        = list->op;
    const struct ggml_ext_kv_entry * entry     = list->entries + i;
    const char *                     block     = ggml_ext_kv_lists_block(op, entry);
    const int32_t *                  positions = (const int32_t *) block + entry->begin;

    // As unsigned numbers negative ones are large: loops without branches, which compilers vectorise.
    uint32_t last_position = 0, last_cell = 0, gaps = 0;
    for (int t = 0; t < entry->count; t++) {
        last_position = MAX(last_position, (uint32_t) positions[t]);
    }
    GGML_ASSERT(last_position < op->n_positions && "ggml-ext: kv_attend: a position");
    for (int t = 0; t < entry->count; t++) {
        list->columns[t] = list->cells[positions[t]];
        last_cell        = MAX(last_cell, (uint32_t) list->columns[t]);
        gaps |= (uint32_t) (list->columns[t] - list->columns[0] - t);
    }
    GGML_ASSERT(last_cell < op->plan.n_kv && "ggml-ext: kv_attend: a cell");
    const char * k = block + op->block.k + entry->begin * op->block.k_row;
    const char * v = block + op->block.v + entry->begin * op->block.v_row;
    if (kv_lists_are_codes(op, entry)) {
        char * rows = list->decoded + GGML_EXT_KV_SLOTS * op->p.dk * sizeof(float);
        k           = rows;
        v           = rows + GGML_EXT_KV_SLOTS * op->block.k_row;
        ggml_ext_kv_cold_decode(&op->cold, task->group, block, entry->begin, entry->count, (float *) list->decoded,
                                rows, rows + GGML_EXT_KV_SLOTS * op->block.k_row);
    }
    return (struct ggml_ext_attention_span) {
        .k        = k,
        .v        = v,
        .k_stride = op->block.k_row,
        .v_stride = op->block.v_row,
        .n        = entry->count,
        .column   = list->columns[0],
        .columns  = gaps ? list->columns : NULL,
    };
}

void ggml_ext_kv_lists_prefetch(const void * cache, const struct ggml_ext_attention_task * task, int64_t i) {
    const struct ggml_ext_kv_list * list = cache;
    GGML_UNUSED(task);
    if (i + 1 >= list->n) {
        return;
    }
    const char * block = ggml_ext_kv_lists_block(list->op, list->entries + i + 1);
    const size_t size =
        kv_lists_are_codes(list->op, list->entries + i + 1) ? list->op->cold.block.size : list->op->block.size;
    for (size_t at = 0; at < size; at += 64) {
        __builtin_prefetch(block + at, 0, 2);
    }
}
