// What a loaded model knows of its transforms. Internal to ggml_ext/llama.

#pragma once

#include "activation.h"
#include "ggml-cpp.h"
#include "ggml.h"
#include "transform-hooks.h"

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

// The online transform of one site: x' = clip(left^T X right). Nothing set: no transform.
struct ggml_ext_site {
    int64_t       n        = 0;        // channels
    ggml_tensor * left     = nullptr;  // F32 [n1, n1]
    ggml_tensor * right    = nullptr;  // F32 [n2, n2]
    int           hadamard = 0;        // order, in right's place
    float         clip     = 1.0f;
};

// Per-head transforms of one layer, each F32 [head_dim, head_dim], null where there is none.
struct ggml_ext_heads {
    ggml_tensor * k   = nullptr;  // P
    ggml_tensor * q   = nullptr;  // P^-T
    ggml_tensor * v   = nullptr;  // P_v
    ggml_tensor * out = nullptr;  // P_v^-1
};

// The sites of a block, in the order of the keys that have an element for each.
enum ggml_ext_kind { GGML_EXT_ATTN_IN, GGML_EXT_ATTN_OUT, GGML_EXT_FFN_IN, GGML_EXT_FFN_MID, GGML_EXT_N_KINDS };

// What a transform folded into one block's weights: the graph's activation at a site is x diag(1 / d) (I (x) head),
// head at attn_out alone, where x is the original model's.
struct ggml_ext_fold {
    std::vector<float> diagonals[GGML_EXT_N_KINDS];  // d; empty: ones
    std::vector<float> head;                         // [order, order]; empty: the identity
    int64_t            order = 0;
};

struct ggml_ext_weight {
    const ggml_ext_site * site  = nullptr;
    bool                  round = false;  // whether its input is rounded to activation.bits
};

struct ggml_ext_model {
    std::vector<std::unique_ptr<ggml_ext_site>>              sites;
    std::unordered_map<const ggml_tensor *, ggml_ext_weight> weights;
    std::vector<ggml_ext_heads>                              heads;      // per layer; empty: none
    ggml_ext_activation                                      activation;
    std::string                                              transform;  // its name
    std::vector<ggml_ext_fold>                               folds;      // per block; empty: not recorded
    uint64_t                                                 digest = 0;
    bool                                                     has_k  = false;
    bool                                                     has_v  = false;
    std::vector<ggml_context_ptr>                            contexts;
    std::vector<ggml_backend_buffer_ptr>                     buffers;
};

// The tensor that owns the data of a view.
inline const ggml_tensor * ggml_ext_root(const ggml_tensor * tensor) {
    return tensor->view_src ? tensor->view_src : tensor;
}

// The ops take any strides between rows, but the values of a row adjacent.
inline ggml_tensor * ggml_ext_with_adjacent_values(ggml_context * ctx, ggml_tensor * x) {
    return x->nb[0] == sizeof(float) ? x : ggml_cont(ctx, x);
}
