// A product with FQ4 or FQ4_64 weights, cut into tiles: what the kernels get, and how the launchers choose the cut. Plain C++, so
// that tests launch what a device would.

#pragma once

#include "common/occupancy.h"
#include "common/tuning.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>

// Rows of weights in a tile; a warp has 32 of them.
constexpr int GGML_EXT_FQ4_TILE_ROWS    = 128;
constexpr int GGML_EXT_FQ4_TILE_THREADS = 128;
// Columns of a tile where there are no tensor cores for int8.
constexpr int GGML_EXT_FQ4_TILE_DP4A    = 32;

// Columns of a tile that use one expert: the pairs[first .. first + count - 1]. No columns: count <= 0.
struct ggml_ext_fq4_expert_tile {
    int32_t expert, first, count;
};

struct ggml_ext_fq4_product {
    // Row r of matrix (i2, i3) starts at weights + r nb1 + i2 nb2 + i3 nb3 and is n_blocks blocks long. Any even address,
    // FQ4_64's any at all. The kernels read whole words of 4 aligned bytes: up to 3 bytes before and after a block, which is inside an
    // allocation of the CUDA backend (aligned to 128 bytes, and its size rounded up to 256).
    const char * weights;
    int64_t      nb1, nb2, nb3;
    int32_t      m;         // rows of a matrix
    int32_t      n_blocks;  // of a row, > 0
    int32_t      k;         // weights of a row

    // As ggml_ext_cuda_activation.
    const int8_t * codes;
    const float *  scales;
    int64_t        n_activations;

    // Column (i1, i2, i3) starts at dst + i1 s1 + i2 s2 + i3 s3.
    float * dst;
    int64_t s1, s2, s3;

    // MUL_MAT: column i1 < n of batch (i2, i3) is activation i1 + n (i2 + ne2 i3), the weights' batch is
    // (i2 / repeat2, i3 / repeat3).
    int32_t n, ne2, ne3, repeat2, repeat3;

    // MUL_MAT_ID where tiles is set: pair p = token n_used + slot is column (slot, token) of dst and activation
    // token ne1 + slot % ne1.
    const ggml_ext_fq4_expert_tile * tiles;
    const int32_t *                  pairs;
    int32_t                          n_used, ne1;

    // The steps (tile, block), block fastest and column tiles before row tiles, are dealt to the thread blocks in equal
    // ranges. Where a range starts inside a tile, this part of the tile goes to partial[block][column][row] and is added
    // by ggml_ext_fq4_tiles_join; all else goes to dst.
    int32_t column_tiles;  // of all batches, or length of tiles[]
    int32_t row_tiles;
    int32_t n_ranges;
    float * partial;
};

// The first step of range i of n: the first ranges are one step longer where they cannot be equal. The ranges are the
// same on every run.
#ifdef __CUDACC__
__host__ __device__
#endif
inline int32_t
ggml_ext_fq4_range_begin(int32_t i, int32_t n, int32_t n_steps) {
    const int32_t rest = n_steps % n;
    return n_steps / n * i + (i < rest ? i : rest);
}

struct ggml_ext_fq4_tiling {
    int  columns;  // of a tile: 16, 32, 64 or 128
    int  row_tiles;
    int  column_tiles;
    int  n_ranges;  // thread blocks
    bool split;     // ranges may start inside a tile
};

// Words that a warp's 32 rows of one block of `weights` take in shared memory: see tiles_decode.cuh.
constexpr int ggml_ext_fq4_raw_words(int weights) {
    return 32 * (weights == 256 ? 36 : 11);
}

// Shared memory of a thread block whose steps are blocks of `weights`: see tiles.cuh.
constexpr size_t ggml_ext_fq4_tile_shared(int columns, int weights) {
    const int slice   = columns < 64 ? columns : 64;
    const int n_slots = columns / slice + 1;
    return 2048 + 4 * 4 * ggml_ext_fq4_raw_words(weights) + size_t(n_slots) * slice * (weights + 4) +
           size_t(columns) * (4 + 8) + 32;
}

// Thread blocks of one multiprocessor: as many as registers allow (the kernels' launch bounds) ...
constexpr int ggml_ext_fq4_tile_residents(int columns) {
    return columns >= 64 ? 2 : 3;
}
// ... and shared memory.
inline int ggml_ext_fq4_tile_residents(int columns, int weights, size_t shared_limit) {
    return std::max(1, std::min(ggml_ext_fq4_tile_residents(columns),
                                ggml_ext::blocks_by_shared(shared_limit, ggml_ext_fq4_tile_shared(columns, weights))));
}

// Widest tile that leaves two steps' data in a thread block's shared memory.
inline int ggml_ext_fq4_widest_tile(int weights, size_t shared_limit) {
    int columns = 128;
    while (columns > 16 && ggml_ext_fq4_tile_shared(columns, weights) > shared_limit) {
        columns /= 2;
    }
    return columns;
}

// Clocks of a multiprocessor for a step of each of n_ranges thread blocks, by the weights of a row in it.
inline int64_t ggml_ext_fq4_steps_clocks(int columns, int weights, int64_t n_ranges, int n_sm) {
    const int64_t beside = (n_ranges + n_sm - 1) / n_sm;
    return std::max(ggml_ext::fq4_lone_step_clocks(columns), beside * ggml_ext::fq4_step_clocks(columns)) * weights /
           256;
}

// How to cut n columns (times n_batches) of an m x (n_blocks blocks of `weights`) matrix on a device of n_sm
// multiprocessors.
inline ggml_ext_fq4_tiling ggml_ext_fq4_choose_tiling(int64_t m, int64_t n_blocks, int weights, int64_t n,
                                                      int64_t n_batches, int n_sm, size_t shared_limit) {
    ggml_ext_fq4_tiling t = {};
    t.columns             = 16;
    while (t.columns < n && t.columns < ggml_ext_fq4_widest_tile(weights, shared_limit)) {
        t.columns *= 2;
    }
    t.row_tiles           = int((m + GGML_EXT_FQ4_TILE_ROWS - 1) / GGML_EXT_FQ4_TILE_ROWS);
    t.column_tiles        = int((n + t.columns - 1) / t.columns * n_batches);
    const int64_t n_tiles = int64_t(t.row_tiles) * t.column_tiles;
    const int64_t at_once = int64_t(n_sm) * ggml_ext_fq4_tile_residents(t.columns, weights, shared_limit);

    const int64_t rest  = n_tiles % at_once;
    const int64_t whole = n_blocks * (n_tiles / at_once * ggml_ext_fq4_steps_clocks(t.columns, weights, at_once, n_sm) +
                                      (rest ? ggml_ext_fq4_steps_clocks(t.columns, weights, rest, n_sm) : 0));
    // A part is written, read, and the result read and written; and there is a launch more.
    const int64_t n_steps = n_tiles * n_blocks;
    const int64_t n_ranges =
        std::max<int64_t>(1, std::min(at_once, n_steps * weights / (256 * ggml_ext::fq4_min_range_steps)));
    const int64_t bytes = n_ranges * GGML_EXT_FQ4_TILE_ROWS * t.columns * 4 * 4;
    const int64_t parts =
        (n_steps + n_ranges - 1) / n_ranges * ggml_ext_fq4_steps_clocks(t.columns, weights, n_ranges, n_sm) +
        bytes / (ggml_ext::fq4_bytes_per_clock * n_sm) + ggml_ext::fq4_launch_clocks;
    t.split    = n_ranges > 1 && parts < whole;
    t.n_ranges = int(t.split ? n_ranges : n_tiles);
    return t;
}

// The same for n_pairs columns shared out among n_experts in an unknown way: every expert may leave a tile unfilled.
inline ggml_ext_fq4_tiling ggml_ext_fq4_choose_expert_tiling(int64_t m, int weights, int64_t n_pairs, int64_t n_experts,
                                                             size_t shared_limit) {
    ggml_ext_fq4_tiling t = {};
    t.columns             = 16;
    while (t.columns < n_pairs / n_experts && t.columns < ggml_ext_fq4_widest_tile(weights, shared_limit)) {
        t.columns *= 2;
    }
    t.row_tiles    = int((m + GGML_EXT_FQ4_TILE_ROWS - 1) / GGML_EXT_FQ4_TILE_ROWS);
    t.column_tiles = int(n_pairs / t.columns + n_experts);
    t.n_ranges     = t.row_tiles * t.column_tiles;
    return t;
}
