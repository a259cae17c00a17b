// Coupled codes of a paged KV cache's old tokens (coupled quantisation, arXiv 2405.03917): a byte stands for 4 or 8
// adjacent channels of a head, by a codebook of 256 words that the channels' place, the head, and K or V have of their
// own. K's are of keys before RoPE. docs/kv-cache.md has the mathematics.

#ifndef GGML_EXT_KV_COLD_H
#define GGML_EXT_KV_COLD_H

#include "kv_store/block.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define GGML_EXT_KV_WORDS 256

// Rows of angles, F32 [n_rot, 2 * 4096]: cosines [n_rot / 2] and sines of positions 0 .. 4095, then of 0, 4096, 8192 ...;
// a position's angle is the sum of two rows'.
#define GGML_EXT_KV_TURN 4096  // rows of each table of angles

// In op_params, behind the sub-op's own.
struct ggml_ext_kv_cold_params {
    int32_t channels;  // of a code, 4 or 8
    int32_t n_rot;     // K's first channels that RoPE turns, 0: none
    int32_t neox;      // whether it turns channel i with i + n_rot / 2, and not 2 i with 2 i + 1
    float   length;    // what RoPE multiplies keys by beside turning them (YaRN)
};

// A block: an int32 position per slot, K's codes [64][dk / channels], V's [64][dv / channels], then, where slots can be
// evicted by it, an F32 score per slot. Each part starts at a multiple of 64 bytes.
struct ggml_ext_kv_cold_block {
    size_t k_row, v_row;
    size_t k, v, score, size;
};

static inline struct ggml_ext_kv_cold_block ggml_ext_kv_cold_block_of(int64_t dk, int64_t dv, int64_t channels,
                                                                      bool scored) {
    struct ggml_ext_kv_cold_block block;
    block.k_row = dk / channels;
    block.v_row = dv / channels;
    block.k     = GGML_EXT_KV_SLOTS * sizeof(int32_t);
    block.v     = block.k + GGML_EXT_KV_SLOTS * block.k_row;
    block.score = block.v + GGML_EXT_KV_SLOTS * block.v_row;
    block.size  = block.score + (scored ? GGML_EXT_KV_SLOTS * sizeof(float) : 0);
    return block;
}

// A KV head's codebooks: F32 scale [dk / channels], [dv / channels]; then int8 words of K [dk / channels][256][channels]
// and of V, whose scales are equal within 32 channels. Both parts are padded to 64 bytes.
struct ggml_ext_kv_books {
    size_t v_scale;
    size_t k, v;
    size_t size;
};

static inline struct ggml_ext_kv_books ggml_ext_kv_books_of(int64_t dk, int64_t dv, int64_t channels) {
    struct ggml_ext_kv_books books;
    books.v_scale = dk / channels * sizeof(float);
    books.k       = (books.v_scale + dv / channels * sizeof(float) + 63) / 64 * 64;
    books.v       = books.k + GGML_EXT_KV_WORDS * dk;
    books.size    = books.v + GGML_EXT_KV_WORDS * dv;
    return books;
}

#ifdef __cplusplus
}
#endif

#endif  // GGML_EXT_KV_COLD_H
