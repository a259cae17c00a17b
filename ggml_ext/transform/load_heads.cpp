// Reading the per-head transforms of a KV cache.

#include "llama-arch.h"
#include "llama-model.h"
#include "loader.h"

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

namespace {

constexpr float   max_residual = 1e-3f;  // of a product that should be the identity
constexpr int64_t max_order    = 1024;   // bounds the time of its check, which grows with the cube

// Largest element of |a^T b - I|, or of |a b - I| where not transposed; NaN if one is. Rows of b are added up,
// so that the memory is read in order.
float distance_from_identity(const ggml_ext_factor & a, const ggml_ext_factor & b, bool transposed) {
    const int64_t      order   = a.order;
    float              largest = 0.0f;
    std::vector<float> row(order);
    for (int64_t i = 0; i < order; i++) {
        std::fill(row.begin(), row.end(), 0.0f);
        row[i] = -1.0f;
        for (int64_t l = 0; l < order; l++) {
            const float   factor = a.data[transposed ? l * order + i : i * order + l];
            const float * from   = b.data.data() + l * order;
            for (int64_t j = 0; j < order; j++) {
                row[j] += factor * from[j];
            }
        }
        for (const float value : row) {
            largest = std::abs(value) <= largest ? largest : std::abs(value);
            if (std::isnan(largest)) {
                return largest;
            }
        }
    }
    return largest;
}

}  // namespace

void ggml_ext_transform_loader::load_heads(uint32_t block) {
    const llama_hparams & hparams = model.hparams;
    ggml_ext_heads        heads;
    std::tie(heads.k, heads.q)   = load_pair(block, "attn_k", "attn_q", hparams.n_embd_head_k(block), true);
    std::tie(heads.v, heads.out) = load_pair(block, "attn_v", "attn_output", hparams.n_embd_head_v(block), false);
    result->has_k                = result->has_k || heads.k;
    result->has_v                = result->has_v || heads.v;
    result->heads.push_back(heads);
}

// Two per-head factors that undo each other: a^T b = I, or a b = I where not transposed. Both or none.
std::pair<ggml_tensor *, ggml_tensor *> ggml_ext_transform_loader::load_pair(uint32_t block, const char * a_matrix,
                                                                             const char * b_matrix, int64_t order,
                                                                             bool transposed) {
    const std::string     a_name = tensor_name(block, a_matrix, "fq_h");
    const std::string     b_name = tensor_name(block, b_matrix, "fq_h");
    const ggml_ext_factor a      = take(a_name);
    const ggml_ext_factor b      = take(b_name);
    if (!a && !b) {
        return {};
    }
    if (!a || !b) {
        ggml_ext_refuse_tensor(a ? a_name : b_name, "needs '" + (a ? b_name : a_name) + "', which the file lacks");
    }
    if (model.hparams.is_mla() || !(weight_in_file(tensor_name(block, "attn_k", "weight")) ||
                                    weight_in_file(tensor_name(block, "attn_qkv", "weight")))) {
        ggml_ext_refuse_tensor(a_name, std::string("is a transform of heads, which block ") + std::to_string(block) +
                                           " of architecture '" + llm_arch_name(model.arch) + "' does not have");
    }
    for (uint32_t il = 0; il < model.hparams.n_layer_all; il++) {
        if (!model.hparams.has_kv(il)) {
            ggml_ext_refuse_tensor(a_name, "is refused: block " + std::to_string(il) +
                                               " has no KV cache of its own and would read one that is transformed");
        }
    }
    for (const ggml_ext_factor * factor : { &a, &b }) {
        if (factor->order != order) {
            ggml_ext_refuse_tensor(factor->name, "has order " + std::to_string(factor->order) + ", the heads have " +
                                                     std::to_string(order) + " channels");
        }
        if (order > max_order) {
            ggml_ext_refuse_tensor(factor->name, "has order " + std::to_string(order) +
                                                     "; transforms of heads have orders up to " +
                                                     std::to_string(max_order));
        }
    }
    const float residual = distance_from_identity(a, b, transposed);
    if (!(residual <= max_residual)) {
        ggml_ext_refuse_tensor(b_name, "does not undo '" + a_name + "': their product differs from the identity by " +
                                           std::to_string(residual));
    }
    const auto type = buffer_type(block);
    return { uploads.add(a, type), uploads.add(b, type) };
}
