// One file per head size instantiates this, so that they compile in parallel.

#pragma once

#include "decode.cuh"

#include <type_traits>

namespace ggml_ext {

// Grid: heads_kv * n_row_blocks * n_chunks, n_streams.
template <int DIM>
cudaError_t attention_decode_launch(const attention_decode_args & args, cache_type k, cache_type v,
                                    cudaStream_t stream) {
    const dim3 grid(unsigned(args.heads_kv * args.n_row_blocks * args.n_chunks), unsigned(args.n_streams));
    const int  groups = decode_groups(args.gqa * args.n_q, DIM);
    const auto launch = [&](void (*kernel)(attention_decode_args)) {
        return ggml_ext_cuda_launch(kernel, grid, dim3(32 * decode_warps), decode_shared_bytes(k, v, DIM, groups),
                                    stream, args);
    };
    const auto with_types = [&](auto k_type, auto v_type) {
        constexpr cache_type K = decltype(k_type)::value, V = decltype(v_type)::value;
        if constexpr (DIM <= 128) {
            if (groups == 2) {
                return launch(ggml_ext_attention_decode_kernel<K, V, DIM, 2>);
            }
        }
        return launch(ggml_ext_attention_decode_kernel<K, V, DIM, 1>);
    };
    const std::integral_constant<cache_type, CACHE_Q8_0> q8_0;
    const std::integral_constant<cache_type, CACHE_Q4_0> q4_0;
    if (k == CACHE_Q8_0) {
        return v == CACHE_Q8_0 ? with_types(q8_0, q8_0) : with_types(q8_0, q4_0);
    }
    return v == CACHE_Q8_0 ? with_types(q4_0, q8_0) : with_types(q4_0, q4_0);
}

}  // namespace ggml_ext
