// Attention of many queries: the kernel's instances and their launch.

#pragma once

#include "prefill.cuh"

namespace ggml_ext {

// f(shape) with the attention_shape of a problem with heads of D.
template <int D, typename F> auto attention_with_shape(int groups, bool full, const F & f) {
    if constexpr (D <= 128) {
        if (full) {
            return groups == 1 ? f(attention_shape<D, 1, true>{}) : f(attention_shape<D, D / 32, true>{});
        }
    }
    return groups == 1 ? f(attention_shape<D, 1, false>{}) : f(attention_shape<D, D / 32, false>{});
}

template <typename F> auto attention_with_head(int d, int groups, bool full, const F & f) {
    switch (d) {
        case 64:
            return attention_with_shape<64>(groups, full, f);
        case 96:
            return attention_with_shape<96>(groups, full, f);
        case 128:
            return attention_with_shape<128>(groups, full, f);
        default:
            return attention_with_shape<256>(groups, full, f);
    }
}

inline size_t attention_shared_bytes(int d, int groups, bool full) {
    return attention_with_head(d, groups, full, [](auto s) { return attention_shared_bytes<decltype(s)>(); });
}

inline int attention_blocks_per_sm(int d, int groups, bool full) {
    return attention_with_head(d, groups, full, [](auto s) { return decltype(s)::BLOCKS; });
}

// The kernel itself. One file per head size instantiates it.
template <int D> cudaError_t attention_launch_prefill(const attention_prefill & p, cudaStream_t stream) {
    return attention_with_shape<D>(p.groups, p.full, [&](auto s) {
        using S = decltype(s);
        return ggml_ext_cuda_launch(attention_prefill_kernel<S>, dim3(p.n_heads, p.n_blocks, p.n_chunks),
                                    dim3(S::THREADS), attention_shared_bytes<S>(), stream, p);
    });
}

}  // namespace ggml_ext
