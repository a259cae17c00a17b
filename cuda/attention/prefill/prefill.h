// Attention of many queries in 8-bit integers: shapes and workspace, on the host and in kernels. docs/attention.md,
// section CUDA, has the mathematics.
//
// A block of threads computes 128 rows of one kv head. Row r of a kv head and stream is query r / gqa, head
// (kv head) * gqa + r % gqa: the heads that share K and V lie side by side, so that few queries fill a block too.

#pragma once

#include <cstddef>
#include <cstdint>

namespace ggml_ext {

constexpr int attention_block_rows = 128;
constexpr int attention_tile       = 64;  // kv tokens of a byte of the mask's summary; chunks are multiples of it
constexpr int attention_max_chunks = 16;

// llama.cpp plans a context's memory without the workspace, so that it is bounded: the cache is taken in windows whose
// prepared K and V, and chunks whose partial results, take about so many bytes at most, however long it is.
constexpr int64_t attention_max_bytes = int64_t(128) << 20;
constexpr int     attention_window    = 512;  // tiles, 32768 tokens: more gain nothing

enum attention_type { ATTENTION_F16, ATTENTION_Q8_0, ATTENTION_Q4_0 };

// Byte strides nb of dimensions 1 .. 3 as in ggml; dimension 0 is contiguous.
struct attention_tensor {
    const char *   data;
    int64_t        nb1, nb2, nb3;
    attention_type type;  // of K and V
};

// What a tile of the mask holds for a block's queries.
enum attention_visible : uint8_t { ATTENTION_HIDDEN, ATTENTION_VISIBLE, ATTENTION_MIXED };

// K and V of the tokens that a kernel takes in one step, adjacent in memory: offsets in bytes.
//   K codes        int8 [tokens][d]
//   K scales       float [groups + 1][tokens]: the last row undoes magic (numerics.h), from which integer sums start:
//                  |sum| <= 127 * 127 * 256 for logits, 255 * 127 * 64 for V
//   V, half        f16 [tokens][d]
//   V codes, full  int8 [d][tokens]; token 32 s + 16 h + 8 i + 2 t + j stands at 32 s + 16 h + 4 t + 2 i + j, so that
//                  the weights of a thread are the bytes of one register of mma_u8s8
//   V levels, full float [tokens], 255 max|v| of the token / max|v| of the step, then max|v| of the step / 127 / 255
struct attention_step {
    int tokens = 0, scales_at = 0, v_at = 0, levels_at = 0, bytes = 0;

    constexpr attention_step() = default;

    constexpr attention_step(int d, int groups, bool full) :
        tokens(full ? 64 : 32), scales_at(tokens * d), v_at(scales_at + tokens * (groups + 1) * 4),
        levels_at(v_at + tokens * d * (full ? 1 : 2)), bytes(levels_at + (full ? tokens * 4 + 16 : 0)) {}
};

// Of a row: logits are (integer sum) * k scale * q scale + bias, in units of log2.
struct alignas(16) attention_row {
    float scale;  // max|q| / 127 * softmax scale * log2(e), with a softcap without log2(e) and over the cap
    float bias;   // the same for what smoothing took off K
    float slope;  // * log2(e)
    float sink;   // * log2(e), -inf for none
};

struct attention_problem {
    attention_tensor q, k, v, mask;   // q: F32, mask: F16 [n_kv, >= n_q, 1, n_mask_streams] or data NULL
    const float *    sinks;           // [gqa * heads_kv] or NULL
    float *          out;             // [n_streams][n_q][gqa * heads_kv][d]
    int64_t          n_mask_streams;  // divides n_streams
    int              d, n_q, n_kv, heads_kv, gqa, n_streams;
    float            scale, softcap, max_bias;
    bool             full;    // 8-bit weights, for heads up to 128; else f16 ones
    bool             smooth;  // for f16 K
};

// Made by attention_plan.
struct attention_cut {
    attention_step layout;
    int            groups;    // K scales per token: one for f16 K, else one per 32 channels
    int            n_heads;   // kv heads of all streams
    int            n_rows;    // per kv head
    int            n_blocks;  // of rows, per kv head
    int            n_tiles;   // of 64 kv tokens; what the cache lacks counts as hidden
    int            window;    // tiles that are prepared and taken at a time
    int            n_windows;
    int            n_chunks;  // of a window, each by other blocks of threads
    int            chunk;     // tiles of a chunk
    int64_t        padded_rows;

    int parts() const { return n_windows > 1 ? n_chunks + 1 : n_chunks > 1 ? n_chunks : 0; }
};

// Placed by attention_place; heads are kv heads of all streams.
struct attention_workspace {
    int8_t *        q_codes;  // [heads][padded_rows][d]
    attention_row * q_rows;   // [heads][padded_rows]
    float *         k_mean;   // [heads][d], with smoothing
    float *         k_sums;   // [heads][n_tiles][d], with smoothing
    char *          steps;    // [heads][window * attention_tile / layout.tokens][layout.bytes]
    uint8_t *       visible;  // attention_visible [n_mask_streams][n_blocks][n_tiles], with a mask
    // Parts of results, with more than one: the window's chunks, then with more than one window what came before it.
    float *         partial;       // [parts()][heads][padded_rows][d]
    float *         partial_meta;  // [parts()][heads][padded_rows][2]: maximum and sum
};

// What kernels get.
struct attention_prefill : attention_problem, attention_cut, attention_workspace {
    int first_tile, end_tile;  // of the launch's window
};

}  // namespace ggml_ext
