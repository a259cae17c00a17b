// Constants of plans and choices that are estimates: counted in docs/fq4.md and docs/attention.md, measured on no device.

#ifndef GGML_EXT_CUDA_TUNING_H
#define GGML_EXT_CUDA_TUNING_H

#include <cstdint>

namespace ggml_ext {

// --- FQ4, clocks of one multiprocessor (docs/fq4.md, "CUDA: many columns") ---

// Columns from which tiles are meant. The kernels for few columns take 8 at a time, so 9 columns read the weights twice,
// while a tile reads them once and costs the same for 1 to 16 columns.
constexpr int fq4_tiles_min_columns = 9;

// One step of a tile while others run beside it: decoding, or shared memory's bandwidth.
constexpr int64_t fq4_step_clocks(int columns) {
    return columns <= 48 ? 1100 : 620 + 10 * columns;
}

// The same with the multiprocessor to itself: decoding, then multiplying while the next rows are on their way.
constexpr int64_t fq4_lone_step_clocks(int columns) {
    return 1000 + (13 * columns > 900 ? 13 * columns : 900);
}

constexpr int     fq4_min_range_steps = 4;   // of 256 weights, of a thread block's range
constexpr int64_t fq4_bytes_per_clock = 20;  // that parts of tiles are written and read with
constexpr int64_t fq4_launch_clocks   = 4000;

// --- attention (docs/attention.md) ---

// From where on many queries are worth their preparation. Rows: query tokens times the heads that share a kv head.
constexpr int64_t attention_min_kv       = 512;
constexpr int64_t attention_min_rows     = 64;    // quantised K and V, which llama.cpp's kernel expands first
constexpr int64_t attention_min_rows_f16 = 1024;  // K or V f16

constexpr int attention_chunk_tiles = 4;  // what one of several chunks costs beside its tiles: Q, first loads, the part
constexpr int decode_overhead_steps = 2;  // what a block costs beside its steps, in steps of all its warps

}  // namespace ggml_ext

#endif  // GGML_EXT_CUDA_TUNING_H
