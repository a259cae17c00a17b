// Attention of many queries: what comes after it where the cache was cut into chunks.

#pragma once

#include "attention_prefill.cuh"

namespace ggml_ext {

// Chunks into results, in ascending order. A warp per row in a grid-stride loop over n_heads * n_rows.
constexpr int attention_merge_threads = 256;

static __global__ void __launch_bounds__(attention_merge_threads) attention_merge_kernel(attention_prefill p) {
    const int64_t step = int64_t(gridDim.x) * (blockDim.x / 32);
    const int64_t rows = int64_t(p.n_heads) * p.padded_rows;
    for (int64_t i = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32; i < int64_t(p.n_heads) * p.n_rows;
         i += step) {
        const int     head = int(i / p.n_rows), r = int(i % p.n_rows);
        const int64_t at   = head * p.padded_rows + r;
        const auto    meta = [&](int chunk) {
            return *reinterpret_cast<const float2 *>(p.partial_meta + 2 * (chunk * rows + at));
        };
        float max = -INFINITY, sum = 0.0f;
        for (int chunk = 0; chunk < p.n_chunks; chunk++) {
            max = fmaxf(max, meta(chunk).x);
        }
        const auto weight = [&](float2 m) {  // an empty chunk has the maximum -inf, and so has one of NaN
            return m.x == -INFINITY ? 1.0f : exp2_approx(m.x - max);
        };
        for (int chunk = 0; chunk < p.n_chunks; chunk++) {
            sum = fmaf(meta(chunk).y, weight(meta(chunk)), sum);
        }
        const float last = attention_normaliser(p, p.q_rows[at], max, sum);
        for (int channel = int(threadIdx.x % 32); channel < p.d; channel += 32) {
            float o = 0.0f;
            for (int chunk = 0; chunk < p.n_chunks; chunk++) {
                o = fmaf(p.partial[(chunk * rows + at) * p.d + channel], weight(meta(chunk)), o);
            }
            p.out[attention_out_at(p, head, r) + channel] = o * last;
        }
    }
}

}  // namespace ggml_ext
