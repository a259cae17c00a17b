// Reading a model's transforms: which tensors and keys belong to which weights, and what is refused.

#include "llama-impl.h"
#include "llama-model.h"
#include "metadata.h"
#include "settings.h"
#include "transform-loader.h"

#include <algorithm>
#include <stdexcept>

// The matrices that read a site, its anchor first. unless: a matrix beside which the row does not hold.
struct ggml_ext_layout {
    uint32_t                  kind;
    std::vector<const char *> matrices;
    const char *              unless = nullptr;
};

namespace {

const ggml_ext_layout layouts[] = {
    { 0, { "attn_q", "attn_k", "attn_v" } },
    { 0, { "attn_qkv" } },
    { 1, { "attn_output" } },
    { 2, { "ffn_gate", "ffn_up" } },
    { 2, { "ffn_up" }, "ffn_gate" },
    { 2, { "ffn_gate_exps", "ffn_up_exps" } },
    { 3, { "ffn_down" } },
    { 3, { "ffn_down_exps" } },
};

}  // namespace

void ggml_ext_refuse_key(const char * key, const std::string & why) {
    throw std::runtime_error(std::string("ggml-ext: key '") + key + "' " + why);
}

ggml_ext_factor ggml_ext_transform_loader::take(const std::string & name) {
    ggml_ext_factor factor = file.take(name);
    if (factor) {
        digest.add(factor.name);
        digest.add(factor.data);
    }
    return factor;
}

// Whether the keys, the tensors and the way of loading agree.
void ggml_ext_transform_loader::check_keys() {
    transform = ggml_ext_transform_name(ml.metadata);
    hadamards = ggml_ext_read_array<uint32_t>(ml.metadata, "ggml_ext.transform.hadamard");
    clips     = ggml_ext_read_array<float>(ml.metadata, "ggml_ext.transform.clip");

    const uint32_t n_block = model.hparams.n_layer_all;
    for (const auto & [key, length] : { std::pair("ggml_ext.transform.hadamard", hadamards.size()),
                                        std::pair("ggml_ext.transform.clip", clips.size()) }) {
        if (length != 0 && length != size_t(GGML_EXT_N_KINDS) * n_block) {
            ggml_ext_refuse_key(key, "has " + std::to_string(length) + " elements, not four for each of the " +
                                         std::to_string(n_block) + " blocks");
        }
    }
    const bool online = ggml_ext_transform_online(transform);
    if (!file.empty() && !online) {
        ggml_ext_refuse_tensor(file.first(),
                               "belongs to a transform, but key 'ggml_ext.transform.name' is '" + transform + "'");
    }
    if (online && ml.files.empty()) {
        ggml_ext_refuse_key("ggml_ext.transform.name",
                            "is '" + transform + "': such a model is loaded from files only");
    }
    if (online && model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
        ggml_ext_refuse_key("ggml_ext.transform.name", "is '" + transform + "', which --split-mode tensor cannot run");
    }
    if (result->activation.bits != 8 && model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
        throw std::runtime_error("ggml-ext: activations are " + result->activation.name() +
                                 ", which --split-mode tensor cannot run; use another mode, or GGML_EXT_ACT=a8");
    }
}

bool ggml_ext_transform_loader::runs(uint32_t block, ggml_ext_op op) {
    ggml_backend_dev_t device       = model.dev_layer(block);
    const auto [entry, first_asked] = support.try_emplace({ device, op }, false);
    if (first_asked) {
        const ggml_init_params params = { 4 * ggml_tensor_overhead(), nullptr, /*no_alloc =*/true };
        ggml_context_ptr       ctx(ggml_init(params));
        ggml_tensor *          x      = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, 256, 1);
        ggml_tensor *          factor = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, 16, 16);
        entry->second                 = ggml_backend_dev_supports_op(device, op == GGML_EXT_OP_KRON ?
                                                                                 ggml_ext_kron(ctx.get(), x, factor, factor, 0, 1.0f) :
                                                                                 ggml_ext_act_round(ctx.get(), x, 4, 0));
        if (!entry->second) {
            LLAMA_LOG_WARN("ggml-ext: %s does not run the op %s; the CPU does it for the blocks there\n",
                           ggml_backend_dev_name(device), ggml_ext_op_name(op));
        }
    }
    return entry->second;
}

ggml_backend_buffer_type_t ggml_ext_transform_loader::buffer_type(uint32_t block) {
    return ggml_backend_dev_buffer_type(runs(block, GGML_EXT_OP_KRON) ?
                                            model.dev_layer(block) :
                                            ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU));
}

std::vector<const ggml_ext_layout *> ggml_ext_transform_loader::sites_of(uint32_t block, uint32_t kind) const {
    std::vector<const ggml_ext_layout *> found;
    for (const ggml_ext_layout & row : layouts) {
        if (row.kind == kind && weight_in_file(block, row.matrices[0]) &&
            !(row.unless && weight_in_file(block, row.unless))) {
            found.push_back(&row);
        }
    }
    return found;
}

int64_t ggml_ext_transform_loader::channels(uint32_t block, uint32_t kind) const {
    const auto found = sites_of(block, kind);
    return found.size() == 1 ? weight_in_file(block, found[0]->matrices[0])->ne[0] : 0;
}

void ggml_ext_transform_loader::load_sites(uint32_t block) {
    for (uint32_t kind = 0; kind < GGML_EXT_N_KINDS; kind++) {
        // Two sites of a kind (dense and expert matrices in one block) would share their element in the
        // keys, so neither can have a transform; their tensors stay unread and are refused by name.
        const auto found = sites_of(block, kind);
        if (found.size() == 1) {
            load_site(block, *found[0]);
            continue;
        }
        const size_t element = size_t(block) * GGML_EXT_N_KINDS + kind;
        const bool   rotates = !hadamards.empty() && hadamards[element] > 1;
        if (rotates || (!clips.empty() && clips[element] < 1.0f)) {
            ggml_ext_refuse_key(rotates ? "ggml_ext.transform.hadamard" : "ggml_ext.transform.clip",
                                "has a value in element " + std::to_string(element) + ", but block " +
                                    std::to_string(block) +
                                    (found.empty() ? " lacks that site" : " has two such sites"));
        }
    }
}

void ggml_ext_transform_loader::load_site(uint32_t block, const ggml_ext_layout & row) {
    const ggml_tensor *   anchor  = weight_in_file(block, row.matrices[0]);
    const int64_t         n       = anchor->ne[0];
    const size_t          element = size_t(block) * GGML_EXT_N_KINDS + row.kind;
    const ggml_ext_factor left    = take(tensor_name(block, row.matrices[0], "fq_l"));
    const ggml_ext_factor right   = take(tensor_name(block, row.matrices[0], "fq_r"));

    const int64_t order = hadamards.empty() || hadamards[element] < 2 ? 0 : int64_t(hadamards[element]);
    const float   clip  = clips.empty() ? 1.0f : clips[element];
    if (!left && !right && order == 0 && clip == 1.0f) {
        return;
    }
    if (right && order) {
        ggml_ext_refuse_tensor(right.name, "stands beside element " + std::to_string(element) +
                                               " of key 'ggml_ext.transform.hadamard', which takes its place");
    }
    const int64_t n1 = left.order;
    const int64_t n2 = right ? right.order : order;
    if (n1 > 0 && n2 > 0 ? n1 * n2 != n : n % std::max<int64_t>({ n1, n2, 1 }) != 0) {
        const std::string orders = (n1 > 0 && n2 > 0 ? "orders " + std::to_string(n1) + " x " : "order ") +
                                   std::to_string(n2 > 0 ? n2 : n1) + ", which does not fit the " + std::to_string(n) +
                                   " channels of '" + anchor->name + "'";
        if (left || right) {
            ggml_ext_refuse_tensor(left ? left.name : right.name, "makes a transform of " + orders);
        }
        ggml_ext_refuse_key("ggml_ext.transform.hadamard", "has in element " + std::to_string(element) + " " + orders);
    }
    auto site      = std::make_unique<ggml_ext_site>();
    site->n        = n;
    site->hadamard = int(order);  // a divisor of n
    site->clip     = clip;
    attach(block, row, left ? left.name : right ? right.name : anchor->name, site.get());
    const auto type = buffer_type(block);
    site->left      = uploads.add(left, type);
    site->right     = uploads.add(right, type);
    result->sites.push_back(std::move(site));
}

// Gives the site to every matrix that reads it. cause: the tensor that a refusal names.
void ggml_ext_transform_loader::attach(uint32_t block, const ggml_ext_layout & row, const std::string & cause,
                                       const ggml_ext_site * site) {
    const int64_t n = weight_in_file(block, row.matrices[0])->ne[0];
    for (const char * matrix : row.matrices) {
        const std::string   name   = tensor_name(block, matrix, "weight");
        const ggml_tensor * weight = weight_in_file(block, matrix);
        if (!weight) {
            ggml_ext_refuse_tensor(cause, "has a transform that '" + name + "' must read, but the file lacks it");
        }
        if (weight->ne[0] != n) {
            ggml_ext_refuse_tensor(cause, "has a transform that '" + name + "' must read, but its rows have length " +
                                              std::to_string(weight->ne[0]) + ", not " + std::to_string(n));
        }
        // A weight of the file can lack a tensor: upstream skips blocks that this load does not run.
        const auto found = loaded.find(name);
        if (found != loaded.end()) {
            result->weights[found->second].site = site;
        }
    }
}

// A file that needs Hadamard matrices at run time must hold something that stock llama.cpp refuses.
void ggml_ext_transform_loader::check_marked() const {
    if (has_factors || std::none_of(hadamards.begin(), hadamards.end(), [](uint32_t order) { return order > 1; })) {
        return;
    }
    for (const auto & [name, weight] : ml.weights_map) {
        if (weight.tensor->type == GGML_TYPE_FQ4) {
            return;
        }
    }
    ggml_ext_refuse_key(
        "ggml_ext.transform.hadamard",
        "is in a file without factors or FQ4 weights, which stock llama.cpp would run without the transform; "
        "store one factor, an identity if need be");
}

void ggml_ext_transform_loader::round_inputs() {
    if (result->activation.bits == 8) {
        return;
    }
    for (const auto & [name, weight] : loaded) {
        if (ggml_ext_rounds_input(weight)) {
            result->weights[weight].round = true;
        }
    }
    for (uint32_t block = 0; block < model.hparams.n_layer_all; block++) {
        runs(block, GGML_EXT_OP_ACT_ROUND);  // for the log: the scheduler finds the backend by itself
    }
}

void ggml_ext_transform_loader::log() const {
    LLAMA_LOG_INFO("ggml-ext: transform %s, %zu sites online; activations %s; learned KV transforms: %s\n",
                   transform.c_str(), result->sites.size(), result->activation.name().c_str(),
                   result->has_k && result->has_v ? "K and V" :
                   result->has_k                  ? "K" :
                   result->has_v                  ? "V" :
                                                    "none");
}

std::shared_ptr<ggml_ext_model> ggml_ext_transform_loader::load() {
    result->activation = ggml_ext_read_activation(ml.metadata);
    check_keys();
    for (const auto & [type, context] : ml.ctx_map) {
        for (ggml_tensor * tensor = ggml_get_first_tensor(context.get()); tensor;
             tensor               = ggml_get_next_tensor(context.get(), tensor)) {
            loaded.emplace(tensor->name, tensor);
        }
    }
    for (uint32_t block = 0; block < model.hparams.n_layer_all; block++) {
        load_sites(block);
        load_heads(block);
    }
    if (!file.empty()) {
        ggml_ext_refuse_tensor(file.first(), "is a transform of no site of this model");
    }
    check_marked();
    load_folds();
    round_inputs();
    if (transform == "none" && result->weights.empty() && result->activation.bits == 8) {
        return nullptr;
    }
    result->transform = transform;
    result->digest    = digest_all();
    uploads.upload(ml.no_alloc, result->contexts, result->buffers);
    log();
    return result;
}

void ggml_ext_llama_load(llama_model_loader & ml, llama_model & model) {
    ggml_ext_check_settings();
    model.ggml_ext = ggml_ext_transform_loader(ml, model).load();
}
