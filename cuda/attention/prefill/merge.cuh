// Attention of many queries: what comes after it where the cache was cut into chunks or windows.

#pragma once

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
        float max = -INFINITY, sum = 0.0f;
        for (int part = 0; part < n; part++) {
            max = fmaxf(max, meta(part).x);
        }
        const auto weight = [&](float2 m) {  // an empty part has the maximum -inf, and so has one of NaN
            return m.x == -INFINITY ? 1.0f : exp2_approx(m.x - max);
        };
        for (int part = 0; part < n; part++) {
            sum = fmaf(meta(part).y, weight(meta(part)), sum);
        }
        const float factor = last ? attention_normaliser(p, p.q_rows[at], max, sum) : 1.0f;
        float *     to     = last ? p.out + attention_out_at(p, head, r) : p.partial + (p.n_chunks * rows + at) * p.d;
        for (int channel = int(threadIdx.x % 32); channel < p.d; channel += 32) {
            float o = 0.0f;
            for (int part = 0; part < n; part++) {
                o = fmaf(p.partial[(part * rows + at) * p.d + channel], weight(meta(part)), o);
            }
            to[channel] = o * factor;
        }
        if (!last) {
            __syncwarp();  // no lane reads the old maximum and sum any more
            if (threadIdx.x % 32 == 0) {
                *reinterpret_cast<float2 *>(p.partial_meta + 2 * (p.n_chunks * rows + at)) = make_float2(max, sum);
            }
        }
    }
}

}  // namespace ggml_ext
