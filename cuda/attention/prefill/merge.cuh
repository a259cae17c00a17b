// Attention of many queries: what comes after it where the cache was cut into chunks or windows.

#pragma once

#include "attention/parts.cuh"
#include "prefill.cuh"

namespace ggml_ext {

// A window's chunks, in ascending order, and what came before it: into results with the last window, else into the part
// after the chunks. A warp per row in a grid-stride loop over n_heads * n_rows.
constexpr int attention_merge_threads = 256;

static __global__ void __launch_bounds__(attention_merge_threads) attention_merge_kernel(attention_prefill p) {
    const int64_t step = int64_t(gridDim.x) * (blockDim.x / 32);
    const int64_t rows = int64_t(p.n_heads) * p.padded_rows;
    const bool    last = p.first_tile + p.window >= p.n_tiles;
    const int     n    = p.first_tile > 0 ? p.n_chunks + 1 : p.n_chunks;
    for (int64_t i = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32; i < int64_t(p.n_heads) * p.n_rows;
         i += step) {
        const int     head = int(i / p.n_rows), r = int(i % p.n_rows);
        const int64_t at   = head * p.padded_rows + r;
        const auto    meta = [&](int part) {
            return *reinterpret_cast<const float2 *>(p.partial_meta + 2 * (part * rows + at));
        };
        float max = -INFINITY, total = 0.0f;
        for (int part = 0; part < n; part++) {
            max = fmaxf(max, meta(part).x);
        }
        float * to = last ? p.out + attention_out_at(p, head, r) : p.partial + (p.n_chunks * rows + at) * p.d;
        for (int channel = 4 * int(threadIdx.x % 32); channel < p.d; channel += 128) {
            float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            total      = 0.0f;
            attention_add_parts(total, sum, 0, 1, n, max, meta, [&](int part) {
                return *reinterpret_cast<const float4 *>(p.partial + (part * rows + at) * p.d + channel);
            });
            const float factor = last ? attention_normaliser(p, p.q_rows[at], max, total) : 1.0f;
            *reinterpret_cast<float4 *>(to + channel) =
                make_float4(sum.x * factor, sum.y * factor, sum.z * factor, sum.w * factor);
        }
        if (!last) {
            __syncwarp();  // no lane reads the old maximum and sum any more
            if (threadIdx.x % 32 == 0) {
                *reinterpret_cast<float2 *>(p.partial_meta + 2 * (p.n_chunks * rows + at)) = make_float2(max, total);
            }
        }
    }
}

}  // namespace ggml_ext
