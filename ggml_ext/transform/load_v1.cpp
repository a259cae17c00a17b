// Version 1 of the format: a block has four sites, and who reads and makes their channels follows from names.

#include "llama-model.h"
#include "loader.h"

#include <algorithm>
#include <iterator>

namespace {

// The matrices that read a site, its anchor first. unless: a matrix beside which the row does not hold.
struct layout {
    uint32_t                  kind;
    std::vector<const char *> matrices;
    const char *              unless = nullptr;
};

const layout layouts[] = {
    { GGML_EXT_ATTN_IN, { "attn_q", "attn_k", "attn_v" } },
    { GGML_EXT_ATTN_IN, { "attn_qkv" } },
    { GGML_EXT_ATTN_OUT, { "attn_output" } },
    { GGML_EXT_FFN_IN, { "ffn_gate", "ffn_up" } },
    { GGML_EXT_FFN_IN, { "ffn_up" }, "ffn_gate" },
    { GGML_EXT_FFN_IN, { "ffn_gate_exps", "ffn_up_exps" } },
    { GGML_EXT_FFN_MID, { "ffn_down" } },
    { GGML_EXT_FFN_MID, { "ffn_down_exps" } },
};

// What else reads the original's activation at a site of the kind.
const char * const routers[GGML_EXT_N_KINDS] = { nullptr, nullptr, "ffn_gate_inp", nullptr };

}  // namespace

// The site of that kind. Where the block has none or two of them (dense and expert matrices), its element in the keys
// stands for no site: n is 0, and the readers are those of both.
ggml_ext_place ggml_ext_transform_loader::implied(uint32_t block, uint32_t kind) const {
    const auto name = [&](const char * matrix) { return tensor_name(block, matrix, "weight"); };
    const auto in   = [&](const char * matrix) { return weight_in_file(name(matrix)); };

    ggml_ext_place place;
    place.block    = block;
    size_t n_found = 0;
    for (const layout & row : layouts) {
        if (row.kind != kind || !in(row.matrices[0]) || (row.unless && in(row.unless))) {
            continue;
        }
        place.n = n_found++ == 0 ? in(row.matrices[0])->ne[0] : 0;
        std::transform(row.matrices.begin(), row.matrices.end(), std::back_inserter(place.readers), name);
    }
    place.n_online = n_found == 1 ? place.readers.size() : 0;
    if (routers[kind] && in(routers[kind])) {
        place.readers.push_back(name(routers[kind]));
    }
    if (place.n == 0) {
        return place;
    }
    const llama_hparams & hparams = model.hparams;
    const char *          maker   = nullptr;
    if (kind == GGML_EXT_ATTN_OUT) {
        const int64_t dim    = hparams.n_embd_head_v(block);
        const int64_t n_head = hparams.n_head(block);
        const int64_t n_kv   = hparams.n_head_kv(block);
        maker                = in("attn_v") ? "attn_v" : "attn_qkv";
        if (!in(maker) || hparams.is_mla() || n_kv < 1 || n_head % n_kv != 0 || place.n != n_head * dim) {
            return place;
        }
        place.head_dim = dim;
        place.rows     = n_kv * dim;
    } else if (kind == GGML_EXT_FFN_MID) {
        maker      = in("ffn_down") ? "ffn_up" : "ffn_up_exps";
        place.rows = place.n;
    }
    if (maker && in(maker)) {
        place.maker = name(maker);
        place.first = in(maker)->ne[1] - place.rows;  // its last rows
    }
    return place;
}

void ggml_ext_transform_loader::place_implied() {
    const size_t n_element = size_t(GGML_EXT_N_KINDS) * model.hparams.n_layer_all;
    for (size_t element = 0; element < n_element; element++) {
        const uint32_t block = uint32_t(element / GGML_EXT_N_KINDS);
        result->places.push_back(implied(block, element % GGML_EXT_N_KINDS));
        const ggml_ext_place & place   = result->places.back();
        const bool             rotates = hadamards.size() == n_element && hadamards[element] > 1;
        if (place.n == 0 && (rotates || (clips.size() == n_element && clips[element] < 1.0f))) {
            ggml_ext_refuse_key(rotates ? "ggml_ext.transform.hadamard" : "ggml_ext.transform.clip",
                                "has a value in element " + std::to_string(element) + ", but block " +
                                    std::to_string(block) +
                                    (place.readers.empty() ? " lacks that site" : " has two such sites"));
        }
    }
}
