// What a loaded model knows of its transforms. Internal to ggml_ext/llama.

#pragma once

#include "activation.h"
#include "ggml-cpp.h"
#include "ggml.h"
#include "hooks.h"
#include "kv/codebooks.h"
#include "kv/probe.h"

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

// A site as a file describes it, with what a transform folded into the weights there: the graph's activation is
// x diag(1 / d) (I (x) head), where x is the original model's.
struct ggml_ext_place {
    uint32_t                 block = 0;     // its anchor's
    int64_t                  n     = 0;     // channels; 0 for an element of version 1 that stands for no site
    std::vector<std::string> readers;       // tensors; the first is the anchor
    size_t                   n_online = 0;  // the first so many readers get what the online part makes

    std::vector<float> diagonal;            // d; empty: ones
    std::vector<float> head;                // [order, order]; empty: the identity
    int64_t            order = 0;

    // The matrix whose rows make the channels, empty where a norm does. Of values per head, [head_dim] each, a row makes
    // the same channel of all query heads that share the value head.
    std::string maker;
    int64_t     first    = 0;
    int64_t     rows     = 0;
    int64_t     head_dim = 0;  // 0: a row for each channel

    bool folds() const { return !diagonal.empty() || !head.empty(); }

    // The row, counted from first, that makes a channel.
    int64_t row_of(int64_t channel) const {
        return head_dim == 0 ? channel : channel / (n / rows * head_dim) * head_dim + channel % head_dim;
    }
};

struct ggml_ext_weight {
    const ggml_ext_site * site  = nullptr;
    bool                  round = false;  // whether its input is rounded to activation.bits
};

struct ggml_ext_model {
    std::vector<std::unique_ptr<ggml_ext_site>>              sites;
    std::unordered_map<const ggml_tensor *, ggml_ext_weight> weights;
    std::vector<ggml_ext_heads>                              heads;             // per layer; empty: none
    ggml_ext_activation                                      activation;
    std::string                                              transform;         // its name
    std::vector<ggml_ext_place>                              places;            // all that the file describes
    bool                                                     recorded = false;  // whether it says what was folded
    bool                                 complete = false;  // whether it names all that a fold concerns
    uint64_t                             digest   = 0;      // 0: the model's activations are as stock has them
    bool                                 has_k    = false;
    bool                                 has_v    = false;
    ggml_ext_kv_probes                   probes;
    ggml_ext_kv_codebooks                codebooks;
    std::vector<ggml_context_ptr>        contexts;
    std::vector<ggml_backend_buffer_ptr> buffers;
};

// The tensor that owns the data of a view.
inline const ggml_tensor * ggml_ext_root(const ggml_tensor * tensor) {
    return tensor->view_src ? tensor->view_src : tensor;
}

// The ops take any strides between rows, but the values of a row adjacent.
inline ggml_tensor * ggml_ext_with_adjacent_values(ggml_context * ctx, ggml_tensor * x) {
    return x->nb[0] == sizeof(float) ? x : ggml_cont(ctx, x);
}
