// Reading a model's transforms: which tensors and keys belong to which weights, and what is refused.

#include "factors.h"
#include "llama-impl.h"
#include "llama-model-loader.h"
#include "llama-model.h"
#include "metadata.h"
#include "ops/ext-op.h"
#include "transform.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>

namespace {

constexpr uint32_t n_kinds      = 4;     // attn_in, attn_out, ffn_in, ffn_mid: the order of the per-block keys
constexpr double   max_residual = 1e-3;  // of a product that should be the identity

// The matrices that read a site, its anchor first. unless: a matrix beside which the row does not hold.
struct layout {
    uint32_t                  kind;
    std::vector<const char *> matrices;
    const char *              unless = nullptr;
};

const layout layouts[] = {
    { 0, { "attn_q", "attn_k", "attn_v" } },
    { 0, { "attn_qkv" } },
    { 1, { "attn_output" } },
    { 2, { "ffn_gate", "ffn_up" } },
    { 2, { "ffn_up" }, "ffn_gate" },
    { 2, { "ffn_gate_exps", "ffn_up_exps" } },
    { 3, { "ffn_down" } },
    { 3, { "ffn_down_exps" } },
};

[[noreturn]] void refuse_key(const char * key, const std::string & why) {
    throw std::runtime_error(std::string("ggml-ext: key '") + key + "' " + why);
}

class transform_loader {
  public:
    transform_loader(llama_model_loader & ml, llama_model & model) : ml(ml), model(model), file(ml) {}

    // Null where file and environment ask for nothing.
    std::shared_ptr<ggml_ext_model> load();

  private:
    void check_keys();
    void load_sites(uint32_t block);
    void load_site(uint32_t block, const layout & row);
    void attach(uint32_t block, const layout & row, const std::string & cause, const ggml_ext_site * site);
    void load_heads(uint32_t block);
    void check_marked() const;
    void round_inputs();
    void log() const;

    std::pair<ggml_tensor *, ggml_tensor *> load_pair(uint32_t block, const char * a, const char * b, int64_t order,
                                                      bool transposed);

    std::string tensor_name(uint32_t block, const char * matrix, const char * suffix) const {
        return "blk." + std::to_string(block) + "." + matrix + "." + suffix;
    }

    const ggml_tensor * weight_in_file(uint32_t block, const char * matrix) const {
        return ml.get_tensor_meta(tensor_name(block, matrix, "weight").c_str());
    }

    // The buffer type of the block's device where that runs the transform, else the CPU's.
    ggml_backend_buffer_type_t buffer_type(uint32_t block, int64_t order);

    llama_model_loader &            ml;
    llama_model &                   model;
    ggml_ext_factor_file            file;
    const bool                      has_factors = !file.empty();
    ggml_ext_factor_buffers         uploads;
    std::shared_ptr<ggml_ext_model> result = std::make_shared<ggml_ext_model>();

    std::string           transform;
    // Per block and kind; empty: all 0, all 1.
    std::vector<uint32_t> hadamards;
    std::vector<float>    clips;

    // Weights that this load made tensors for, and devices that do not run the op.
    std::unordered_map<std::string, const ggml_tensor *> loaded;
    std::set<std::string>                                without_kron;
};

// Whether the keys, the tensors and the way of loading agree.
void transform_loader::check_keys() {
    transform = ggml_ext_transform_name(ml.metadata);
    hadamards = ggml_ext_read_array<uint32_t>(ml.metadata, "ggml_ext.transform.hadamard");
    clips     = ggml_ext_read_array<float>(ml.metadata, "ggml_ext.transform.clip");

    const uint32_t n_block = model.hparams.n_layer_all;
    for (const auto & [key, length] : { std::pair("ggml_ext.transform.hadamard", hadamards.size()),
                                        std::pair("ggml_ext.transform.clip", clips.size()) }) {
        if (length != 0 && length != size_t(n_kinds) * n_block) {
            refuse_key(key, "has " + std::to_string(length) + " elements, not four for each of the " +
                                std::to_string(n_block) + " blocks");
        }
    }
    const bool online = ggml_ext_transform_online(transform);
    if (!file.empty() && !online) {
        ggml_ext_refuse_tensor(file.first(),
                               "belongs to a transform, but key 'ggml_ext.transform.name' is '" + transform + "'");
    }
    if (online && ml.files.empty()) {
        refuse_key("ggml_ext.transform.name", "is '" + transform + "': such a model is loaded from files only");
    }
    if (online && model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
        refuse_key("ggml_ext.transform.name", "is '" + transform + "', which --split-mode tensor cannot run");
    }
}

ggml_backend_buffer_type_t transform_loader::buffer_type(uint32_t block, int64_t order) {
    const ggml_init_params params = { 4 * ggml_tensor_overhead(), nullptr, /*no_alloc =*/true };
    ggml_context_ptr       ctx(ggml_init(params));
    ggml_tensor *          factor = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, order, order);
    ggml_tensor *          x      = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, order, 1);
    ggml_backend_dev_t     device = model.dev_layer(block);
    if (!ggml_backend_dev_supports_op(device, ggml_ext_kron(ctx.get(), x, factor, nullptr, 0, 1.0f))) {
        if (without_kron.insert(ggml_backend_dev_name(device)).second) {
            LLAMA_LOG_WARN("%s: ggml-ext: %s does not run EXT_KRON; the transforms of its blocks run on the CPU\n",
                           __func__, ggml_backend_dev_name(device));
        }
        device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    }
    return ggml_backend_dev_buffer_type(device);
}

void transform_loader::load_sites(uint32_t block) {
    const layout * rows[n_kinds]  = {};
    uint32_t       count[n_kinds] = {};
    for (const layout & row : layouts) {
        if (weight_in_file(block, row.matrices[0]) && !(row.unless && weight_in_file(block, row.unless))) {
            rows[row.kind] = &row;
            count[row.kind]++;
        }
    }
    for (uint32_t kind = 0; kind < n_kinds; kind++) {
        // Two sites of a kind (dense and expert matrices in one block) would share their element in the
        // keys, so neither can have a transform; their tensors stay unread and are refused by name.
        if (count[kind] == 1) {
            load_site(block, *rows[kind]);
            continue;
        }
        const size_t element = size_t(block) * n_kinds + kind;
        const bool   rotates = !hadamards.empty() && hadamards[element] > 1;
        if (rotates || (!clips.empty() && clips[element] < 1.0f)) {
            refuse_key(rotates ? "ggml_ext.transform.hadamard" : "ggml_ext.transform.clip",
                       "has a value in element " + std::to_string(element) + ", but block " + std::to_string(block) +
                           (count[kind] == 0 ? " lacks that site" : " has two such sites"));
        }
    }
}

void transform_loader::load_site(uint32_t block, const layout & row) {
    const ggml_tensor *   anchor  = weight_in_file(block, row.matrices[0]);
    const int64_t         n       = anchor->ne[0];
    const size_t          element = size_t(block) * n_kinds + row.kind;
    const ggml_ext_factor left    = file.take(tensor_name(block, row.matrices[0], "fq_l"));
    const ggml_ext_factor right   = file.take(tensor_name(block, row.matrices[0], "fq_r"));

    auto site      = std::make_unique<ggml_ext_site>();
    site->n        = n;
    site->hadamard = hadamards.empty() || hadamards[element] < 2 ? 0 : int(hadamards[element]);
    site->clip     = clips.empty() ? 1.0f : clips[element];
    if (!left && !right && !site->active()) {
        return;
    }
    if (right && site->hadamard) {
        ggml_ext_refuse_tensor(right.name, "stands beside element " + std::to_string(element) +
                                               " of key 'ggml_ext.transform.hadamard', which takes its place");
    }
    const int64_t n1 = left.order;
    const int64_t n2 = right ? right.order : site->hadamard;
    if (n1 > 0 && n2 > 0 ? n1 * n2 != n : n % std::max<int64_t>({ n1, n2, 1 }) != 0) {
        const std::string orders = (n1 > 0 && n2 > 0 ? "orders " + std::to_string(n1) + " x " : "order ") +
                                   std::to_string(n2 > 0 ? n2 : n1) + ", which does not fit the " + std::to_string(n) +
                                   " channels of '" + anchor->name + "'";
        if (left || right) {
            ggml_ext_refuse_tensor(left ? left.name : right.name, "makes a transform of " + orders);
        }
        refuse_key("ggml_ext.transform.hadamard", "has in element " + std::to_string(element) + " " + orders);
    }
    attach(block, row, left ? left.name : right ? right.name : anchor->name, site.get());
    if (left) {
        site->left = uploads.add(left, buffer_type(block, left.order));
    }
    if (right) {
        site->right = uploads.add(right, buffer_type(block, right.order));
    }
    result->sites.push_back(std::move(site));
}

// Gives the site to every matrix that reads it. cause: the tensor that a refusal names.
void transform_loader::attach(uint32_t block, const layout & row, const std::string & cause,
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

void transform_loader::load_heads(uint32_t block) {
    const llama_hparams & hparams = model.hparams;
    ggml_ext_heads        heads;
    std::tie(heads.k, heads.q)   = load_pair(block, "attn_k", "attn_q", hparams.n_embd_head_k(block), true);
    std::tie(heads.v, heads.out) = load_pair(block, "attn_v", "attn_output", hparams.n_embd_head_v(block), false);
    result->has_k                = result->has_k || heads.k;
    result->has_v                = result->has_v || heads.v;
    result->heads.push_back(heads);
}

// Two per-head factors that undo each other: a^T b = I, or a b = I where not transposed. Both or none.
std::pair<ggml_tensor *, ggml_tensor *> transform_loader::load_pair(uint32_t block, const char * a_matrix,
                                                                    const char * b_matrix, int64_t order,
                                                                    bool transposed) {
    const std::string     a_name = tensor_name(block, a_matrix, "fq_h");
    const std::string     b_name = tensor_name(block, b_matrix, "fq_h");
    const ggml_ext_factor a      = file.take(a_name);
    const ggml_ext_factor b      = file.take(b_name);
    if (!a && !b) {
        return {};
    }
    if (!a || !b) {
        ggml_ext_refuse_tensor(a ? a_name : b_name, "needs '" + (a ? b_name : a_name) + "', which the file lacks");
    }
    if (model.hparams.is_mla() || !(weight_in_file(block, "attn_k") || weight_in_file(block, "attn_qkv"))) {
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
    }
    double residual = 0.0;
    for (int64_t i = 0; i < order; i++) {
        for (int64_t j = 0; j < order; j++) {
            double sum = i == j ? -1.0 : 0.0;
            for (int64_t l = 0; l < order; l++) {
                sum += double(a.data[transposed ? l * order + i : i * order + l]) * b.data[l * order + j];
            }
            residual = std::max(residual, std::abs(sum));
        }
    }
    if (!(residual <= max_residual)) {
        ggml_ext_refuse_tensor(b_name, "does not undo '" + a_name + "': their product differs from the identity by " +
                                           std::to_string(residual));
    }
    const auto type = buffer_type(block, order);
    return { uploads.add(a, type), uploads.add(b, type) };
}

// A file that needs Hadamard matrices at run time must hold something that stock llama.cpp refuses.
void transform_loader::check_marked() const {
    if (has_factors || std::none_of(hadamards.begin(), hadamards.end(), [](uint32_t order) { return order > 1; })) {
        return;
    }
    for (const auto & [name, weight] : ml.weights_map) {
        if (weight.tensor->type == GGML_TYPE_FQ4) {
            return;
        }
    }
    refuse_key("ggml_ext.transform.hadamard",
               "is in a file without factors or FQ4 weights, which stock llama.cpp would run without the transform; "
               "store one factor, an identity if need be");
}

void transform_loader::round_inputs() {
    if (result->activation.bits == 8) {
        return;
    }
    for (const auto & [name, weight] : loaded) {
        if (ggml_ext_rounds_input(weight)) {
            result->weights[weight].round = true;
        }
    }
}

void transform_loader::log() const {
    LLAMA_LOG_INFO("%s: ggml-ext: transform %s, %zu sites online; activations %s; learned KV transforms: %s\n",
                   __func__, transform.c_str(), result->sites.size(), result->activation.name().c_str(),
                   result->has_k && result->has_v ? "K and V" :
                   result->has_k                  ? "K" :
                   result->has_v                  ? "V" :
                                                    "none");
}

std::shared_ptr<ggml_ext_model> transform_loader::load() {
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
    round_inputs();
    if (result->weights.empty() && !result->has_k && !result->has_v && result->activation.bits == 8) {
        return nullptr;
    }
    uploads.upload(result->contexts, result->buffers);
    log();
    return result;
}

}  // namespace

void ggml_ext_llama_load(llama_model_loader & ml, llama_model & model) {
    model.ggml_ext = transform_loader(ml, model).load();
}
