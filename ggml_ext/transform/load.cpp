// Reading a model's transforms: which tensors and keys belong to which weights, and what is refused.

#include "llama-impl.h"
#include "llama-model.h"
#include "loader.h"
#include "metadata.h"
#include "settings.h"

#include <algorithm>
#include <stdexcept>

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
    version   = ggml_ext_format_version(ml.metadata);
    transform = ggml_ext_transform_name(ml.metadata);
    hadamards = ggml_ext_read_array<uint32_t>(ml.metadata, "ggml_ext.transform.hadamard");
    clips     = ggml_ext_read_array<float>(ml.metadata, "ggml_ext.transform.clip");

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

void ggml_ext_transform_loader::check_length(const char * key, size_t length, size_t per_block) const {
    const size_t n_block = model.hparams.n_layer_all;
    if (length == 0 || length == (version == 1 ? per_block * n_block : result->places.size())) {
        return;
    }
    const std::string each = per_block == 1 ? "one for each of the " : "four for each of the ";
    ggml_ext_refuse_key(key,
                        "has " + std::to_string(length) + " elements, not " +
                            (version == 1 ? each + std::to_string(n_block) + " blocks" :
                                            "one for each of the " + std::to_string(result->places.size()) + " sites"));
}

void ggml_ext_transform_loader::load_site(size_t element) {
    const ggml_ext_place & place  = result->places[element];
    const std::string      anchor = place.readers[0].substr(0, place.readers[0].rfind(".weight"));
    const int64_t          n      = place.n;
    const ggml_ext_factor  left   = take(anchor + ".fq_l");
    const ggml_ext_factor  right  = take(anchor + ".fq_r");

    const int64_t order = hadamards.empty() || hadamards[element] < 2 ? 0 : int64_t(hadamards[element]);
    const float   clip  = clips.empty() ? 1.0f : clips[element];
    if (!left && !right && order == 0 && clip == 1.0f) {
        return;
    }
    const std::string cause = left ? left.name : right ? right.name : place.readers[0];
    if (place.n_online == 0) {
        ggml_ext_refuse_tensor(cause, "has a transform that runs with the model, but no matrix that reads it");
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
                                   " channels of '" + place.readers[0] + "'";
        if (left || right) {
            ggml_ext_refuse_tensor(left ? left.name : right.name, "makes a transform of " + orders);
        }
        ggml_ext_refuse_key("ggml_ext.transform.hadamard", "has in element " + std::to_string(element) + " " + orders);
    }
    auto site      = std::make_unique<ggml_ext_site>();
    site->n        = n;
    site->hadamard = int(order);  // a divisor of n
    site->clip     = clip;
    attach(place, cause, site.get());
    const auto type = buffer_type(place.block);
    site->left      = uploads.add(left, type);
    site->right     = uploads.add(right, type);
    result->sites.push_back(std::move(site));
}

// Gives the site to every matrix that reads it. cause: the tensor that a refusal names.
void ggml_ext_transform_loader::attach(const ggml_ext_place & place, const std::string & cause,
                                       const ggml_ext_site * site) {
    for (size_t i = 0; i < place.n_online; i++) {
        const std::string & name   = place.readers[i];
        const ggml_tensor * weight = weight_in_file(name);
        if (!weight) {
            ggml_ext_refuse_tensor(cause, "has a transform that '" + name + "' must read, but the file lacks it");
        }
        if (weight->ne[0] != place.n) {
            ggml_ext_refuse_tensor(cause, "has a transform that '" + name + "' must read, but its rows have length " +
                                              std::to_string(weight->ne[0]) + ", not " + std::to_string(place.n));
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
        if (weight.tensor->type >= GGML_TYPE_FQ4) {
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
    version == 1 ? place_implied() : place_listed();
    check_length("ggml_ext.transform.hadamard", hadamards.size(), GGML_EXT_N_KINDS);
    check_length("ggml_ext.transform.clip", clips.size(), GGML_EXT_N_KINDS);
    // The digest has the factors in this order.
    for (uint32_t block = 0; block < model.hparams.n_layer_all; block++) {
        for (size_t element = 0; element < result->places.size(); element++) {
            if (result->places[element].block == block && result->places[element].n != 0) {
                load_site(element);
            }
        }
        load_heads(block);
    }
    if (!file.empty()) {
        ggml_ext_refuse_tensor(file.first(), "is a transform of no site of this model");
    }
    check_marked();
    load_folds();
    round_inputs();
    const bool plain  = transform == "none" && result->weights.empty() && result->activation.bits == 8;
    result->probes    = ggml_ext_kv_load_probes(ml, model, loaded);
    result->codebooks = ggml_ext_kv_load_codebooks(ml, model);
    result->transform = transform;
    if (plain) {
        return result->probes.layers.empty() && result->codebooks.layers.empty() ? nullptr : result;
    }
    result->digest = digest_all();
    uploads.upload(ml.no_alloc, result->contexts, result->buffers);
    log();
    return result;
}

void ggml_ext_llama_load(llama_model_loader & ml, llama_model & model) {
    ggml_ext_check_settings();
    model.ggml_ext = ggml_ext_transform_loader(ml, model).load();
}
