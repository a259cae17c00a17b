// The second kernel of attention for few query tokens: the parts of the chunks become the result.

#pragma once

#include "attention/parts.cuh"
#include "common/numerics.h"
#include "shape.h"

namespace ggml_ext {

// Adds up the chunks of one row of the result, in an order that the shape alone gives. Grid: rows;
// decode_merge_threads.
static __global__ void __launch_bounds__(decode_merge_threads) ggml_ext_attention_decode_merge_kernel(
    attention_decode_args args) {
    __shared__ float  tops[decode_merge_threads / 32];
    __shared__ float  totals[decode_merge_threads];  // of each group of threads that shares chunks
    __shared__ float4 sums[decode_merge_threads];

    const int64_t  row = blockIdx.x;
    const int      id = int(threadIdx.x), width = args.dim / 4, groups = decode_merge_threads / width;
    const int      group = id / width, column = id % width;
    const float2 * parts = reinterpret_cast<const float2 *>(args.totals) + row * args.n_chunks;
    const float    sink  = args.sinks ? args.sinks[row % (args.heads_kv * args.gqa)] * log2_e : -INFINITY;

    float top = sink;
    for (int i = id; i < args.n_chunks; i += decode_merge_threads) {
        top = fmaxf(top, parts[i].x);
    }
    top = warp_max(top);
    if (id % 32 == 0) {
        tops[id / 32] = top;
    }
    __syncthreads();
    for (int i = 0; i < decode_merge_threads / 32; i++) {
        top = fmaxf(top, tops[i]);
    }
    float  total = 0.0f;
    float4 sum   = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (group < groups) {
        const float4 * from = reinterpret_cast<const float4 *>(args.sums + row * args.n_chunks * args.dim) + column;
        attention_add_parts(
            total, sum, group, groups, args.n_chunks, top, [&](int i) { return parts[i]; },
            [&](int i) { return from[int64_t(i) * width]; });
    }
    sums[id]   = sum;
    totals[id] = total;
    __syncthreads();
    if (group == 0) {
        for (int i = 1; i < groups; i++) {
            const float4 part = sums[i * width + column];
            total += totals[i * width + column];
            sum.x += part.x;
            sum.y += part.y;
            sum.z += part.z;
            sum.w += part.w;
        }
        total += exp2_approx(sink - (top == -INFINITY ? 0.0f : top));
        const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
        reinterpret_cast<float4 *>(args.out + row * args.dim)[column] =
            make_float4(sum.x * inverse, sum.y * inverse, sum.z * inverse, sum.w * inverse);
    }
}

}  // namespace ggml_ext
