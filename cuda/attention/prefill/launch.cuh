// Attention of many queries: the launches, in the order in which they run. Shared with the emulator's tests.

#pragma once

#include "merge.cuh"
#include "plan.h"
#include "quantize.cuh"
#include "shapes.cuh"

namespace ggml_ext {

// Blocks for n items, one per warp, in a grid-stride loop.
inline dim3 attention_grid(int64_t n, int threads) {
    return dim3((unsigned) std::min<int64_t>(attention_ceil(n, threads / 32), 65535));
}

// Q and the mask, once for all windows.
inline cudaError_t attention_launch_quantize(const attention_prefill & p, cudaStream_t stream) {
    const dim3  threads(attention_prepare_threads), per_channel((p.d + 31) / 32 * 32);
    cudaError_t error = cudaSuccess;
    if (p.smooth) {
        error = ggml_ext_cuda_launch(attention_k_sums_kernel, dim3(p.n_tiles, p.n_heads), per_channel, 0, stream, p);
        if (error == cudaSuccess) {
            error = ggml_ext_cuda_launch(attention_k_mean_kernel, dim3(p.n_heads), per_channel, 0, stream, p);
        }
    }
    if (error == cudaSuccess) {
        error = ggml_ext_cuda_launch(attention_quantize_q_kernel,
                                     attention_grid(p.n_heads * p.padded_rows, attention_prepare_threads), threads, 0,
                                     stream, p);
    }
    if (error == cudaSuccess && p.visible) {
        error =
            ggml_ext_cuda_launch(attention_visible_kernel,
                                 attention_grid(p.n_mask_streams * p.n_blocks * p.n_tiles, attention_prepare_threads),
                                 threads, 0, stream, p);
    }
    return error;
}

// K and V of the window, attention over it, and what that adds to the windows before it.
template <typename F>
cudaError_t attention_launch_window(const attention_prefill & p, cudaStream_t stream, const F & prefill) {
    const int   n_tiles = std::min(p.window, p.n_tiles - p.first_tile);
    cudaError_t error   = ggml_ext_cuda_launch(
        p.full ? attention_prepare_kv_kernel<true> : attention_prepare_kv_kernel<false>,
        dim3(n_tiles * (attention_tile / p.layout.tokens), p.n_heads), dim3(attention_prepare_threads),
        p.full ? p.layout.tokens * (sizeof(float) + p.d) : 0, stream, p);
    if (error == cudaSuccess) {
        // The kernel, which has no register to spare, numbers steps from the cache's first on.
        attention_prefill window = p;
        window.end_tile          = p.first_tile + n_tiles;
        window.steps =
            reinterpret_cast<char *>(reinterpret_cast<uintptr_t>(p.steps) -
                                     uintptr_t(p.first_tile) * (attention_tile / p.layout.tokens) * p.layout.bytes);
        error = prefill(window, stream);
    }
    if (error == cudaSuccess && p.parts() > 0) {
        error = ggml_ext_cuda_launch(attention_merge_kernel,
                                     attention_grid(int64_t(p.n_heads) * p.n_rows, attention_merge_threads),
                                     dim3(attention_merge_threads), 0, stream, p);
    }
    return error;
}

// Everything, for a planned and placed problem. prefill: attention_launch_prefill of its head size.
template <typename F> cudaError_t attention_launch(attention_prefill p, cudaStream_t stream, const F & prefill) {
    cudaError_t error = attention_launch_quantize(p, stream);
    for (p.first_tile = 0; error == cudaSuccess && p.first_tile < p.n_tiles; p.first_tile += p.window) {
        error = attention_launch_window(p, stream, prefill);
    }
    return error;
}

}  // namespace ggml_ext
