// A block of a paged KV cache: the rows of one head of 64 tokens. docs/kv-cache.md draws it.

#ifndef GGML_EXT_KV_BLOCK_H
#define GGML_EXT_KV_BLOCK_H

#include "ggml.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define GGML_EXT_KV_SLOTS 64  // tokens of a block

// An int32 position per slot comes first; then K's rows, adjacent, in the order of the slots; then V's; then, where
// slots can be evicted by it, an F32 score per slot. Each part starts at a multiple of 64 bytes.
struct ggml_ext_kv_block {
    size_t k_row, v_row;  // of one slot
    size_t k, v;          // where their rows begin
    size_t score;         // where the scores would begin
    size_t size;
};

static inline struct ggml_ext_kv_block ggml_ext_kv_block_of(enum ggml_type type_k, int64_t dk, enum ggml_type type_v,
                                                            int64_t dv, bool scored) {
    struct ggml_ext_kv_block block;
    block.k_row = ggml_row_size(type_k, dk);
    block.v_row = ggml_row_size(type_v, dv);
    block.k     = GGML_EXT_KV_SLOTS * sizeof(int32_t);
    block.v     = block.k + GGML_EXT_KV_SLOTS * block.k_row;
    block.score = block.v + GGML_EXT_KV_SLOTS * block.v_row;
    block.size  = block.score + (scored ? GGML_EXT_KV_SLOTS * sizeof(float) : 0);
    return block;
}

// A run of a list: slots begin .. begin + count - 1 of a block.
struct ggml_ext_kv_entry {
    int32_t  block;
    uint16_t begin, count;
};

static inline bool ggml_ext_kv_is_pool(const struct ggml_tensor * t, size_t block_size) {
    return t != NULL && t->type == GGML_TYPE_I8 && ggml_is_contiguous(t) && t->ne[2] == 1 && t->ne[3] == 1 &&
           t->ne[0] % 64 == 0 && (size_t) t->ne[0] >= block_size;
}

// Whether a result is a view of all of a pool, which is what is written through.
static inline bool ggml_ext_kv_is_view(const struct ggml_tensor * t, const struct ggml_tensor * pool) {
    return t->type == GGML_TYPE_I8 && ggml_are_same_shape(t, pool) && ggml_are_same_stride(t, pool) &&
           t->data == pool->data;
}

#ifdef __cplusplus
}
#endif

#endif  // GGML_EXT_KV_BLOCK_H
