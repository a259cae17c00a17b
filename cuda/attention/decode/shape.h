// Attention for few query tokens over a quantised cache: what host and device share, and how the host cuts the work.
// Plain C++, so that the emulator's test runs the launches that a device gets.

#pragma once

#include "common/occupancy.h"
#include "common/tuning.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace ggml_ext {

enum cache_type { CACHE_Q8_0, CACHE_Q4_0 };

constexpr int decode_warps         = 4;   // of a block; each walks tokens of its own
constexpr int decode_step          = 16;  // tokens that a warp takes at a time
constexpr int decode_n_stages      = 2;   // steps of a warp in shared memory: one computed, one on its way
constexpr int decode_max_queries   = 8;   // more tokens are left to the kernel for prompts
constexpr int decode_merge_threads = 256;

constexpr int cache_block_bytes(cache_type type) {
    return type == CACHE_Q8_0 ? 34 : 18;
}
constexpr int cache_row_bytes(cache_type type, int dim) {
    return dim / 32 * cache_block_bytes(type);
}
// What every row's address is a multiple of when heads lie side by side, at most 16.
constexpr int cache_row_align(cache_type type, int dim) {
    const int bytes = cache_row_bytes(type, dim);
    return bytes % 16 == 0 ? 16 : bytes % 8 == 0 ? 8 : bytes % 4 == 0 ? 4 : 2;
}
// Aligned spans of 16 bytes that a row touches at most.
constexpr int cache_row_spans(cache_type type, int dim) {
    return (cache_row_bytes(type, dim) + 16 - cache_row_align(type, dim) + 15) / 16;
}
// Bytes between rows in shared memory: an odd number of spans, so that 8 rows x 4 words fall into 32 banks.
constexpr int cache_row_stride(cache_type type, int dim) {
    return 16 * (cache_row_spans(type, dim) | 1);
}

// Shared memory of a block. groups: of 8 query rows.
//   stages:  [warp][stage]{ K rows [step][stride], V rows [step][stride] }, at the end float sums[warp][row][dim]
//   results: float maximum[warp][row], total[warp][row]
//   queries: float factor[row], slope[row], int8 codes[row][dim]
constexpr size_t decode_stage_bytes(cache_type k, cache_type v, int dim) {
    return decode_step * size_t(cache_row_stride(k, dim) + cache_row_stride(v, dim));
}
constexpr size_t decode_results_offset(cache_type k, cache_type v, int dim, int groups) {
    const size_t stages = decode_warps * decode_n_stages * decode_stage_bytes(k, v, dim);
    const size_t sums   = sizeof(float) * decode_warps * 8 * groups * dim;
    return stages > sums ? stages : sums;
}
constexpr size_t decode_queries_offset(cache_type k, cache_type v, int dim, int groups) {
    return decode_results_offset(k, v, dim, groups) + 2 * sizeof(float) * decode_warps * 8 * groups;
}
constexpr size_t decode_shared_bytes(cache_type k, cache_type v, int dim, int groups) {
    return decode_queries_offset(k, v, dim, groups) + (2 * sizeof(float) + dim) * 8 * groups;
}

// Strides in bytes as in ggml. Rows of a kv head: row = query * gqa + head % gqa.
struct attention_decode_args {
    const char *  q;       // F32 [dim, n_q, heads, streams]
    const char *  k;       // [dim, n_kv, heads_kv, streams]
    const char *  v;
    const char *  mask;    // F16 [n_kv, n_q, mask_heads, mask_streams], or null
    const float * sinks;   // [heads], or null
    float *       out;     // [dim, heads, n_q, streams], contiguous
    float *       sums;    // [row of out][n_chunks][dim], not divided by the totals
    float *       totals;  // [row of out][n_chunks][2]: maximum of the logits (base 2), sum of the weights
    int64_t       nb_q[4], nb_k[4], nb_v[4], nb_mask[4];
    int           mask_heads, mask_streams;
    int           n_kv, n_q, heads_kv, gqa, n_streams, dim;
    int           n_row_blocks, n_chunks, chunk_tokens;
    float         scale, softcap, max_bias;

    int64_t n_out_rows() const { return int64_t(n_streams) * n_q * heads_kv * gqa; }
};

// Groups of 8 rows per block: 2 where the rows need them and the accumulators fit the registers.
inline int decode_groups(int rows, int dim) {
    return rows > 8 && dim <= 128 ? 2 : 1;
}

// Blocks per SM that the kernels' registers allow for.
constexpr int decode_blocks_per_sm(int dim, int groups) {
    return dim > 128 ? 2 : groups > 1 ? 3 : 4;
}

// Blocks that a device runs at once. block_shared: the most shared memory of a block.
inline int decode_slots(int n_sm, size_t block_shared, size_t shared_bytes, int dim, int groups) {
    const int fit = blocks_by_shared(block_shared, shared_bytes);
    return n_sm * std::max(1, std::min(decode_blocks_per_sm(dim, groups), fit));
}

// Cuts rows and tokens. slots: blocks that the device runs at once. The number of chunks makes
// (waves of blocks) * (steps of a block + overhead) smallest; of equals, the fewest.
inline void decode_plan(attention_decode_args & args, int slots) {
    const int     rows     = args.gqa * args.n_q;
    const int     groups   = decode_groups(rows, args.dim);
    const int     per_step = decode_warps * decode_step;
    const int64_t steps    = std::max<int64_t>(1, (int64_t(args.n_kv) + per_step - 1) / per_step);
    args.n_row_blocks      = (rows + 8 * groups - 1) / (8 * groups);
    const int64_t base     = int64_t(args.n_row_blocks) * args.heads_kv * args.n_streams;
    const int64_t limit    = std::min<int64_t>(steps, 2 * int64_t(slots) / base + 1);
    int64_t       best = 1, best_cost = INT64_MAX;
    for (int64_t n = 1; n <= limit; n++) {
        const int64_t chunk_steps = (steps + n - 1) / n;
        const int64_t chunks      = (steps + chunk_steps - 1) / chunk_steps;
        const int64_t waves       = (base * chunks + slots - 1) / slots;
        const int64_t cost        = waves * (chunk_steps + decode_overhead_steps);
        if (cost < best_cost) {
            best      = chunk_steps;
            best_cost = cost;
        }
    }
    args.chunk_tokens = int(best) * per_step;
    args.n_chunks     = int((steps + best - 1) / best);
}

}  // namespace ggml_ext
