#include "probe.h"

#include "llama-mmap.h"
#include "llama-model-loader.h"
#include "llama-model.h"
#include "weights.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <stdexcept>

namespace {

[[noreturn]] void probe_refuse(const std::string & name, const std::string & why) {
    throw std::runtime_error("ggml-ext: tensor '" + name + "' " + why);
}

std::vector<char> probe_values(llama_model_loader & ml, const std::string & name, int64_t ne0, int64_t ne1) {
    const auto &        weight = ml.require_weight(name.c_str());
    const ggml_tensor * tensor = weight.tensor;
    if (tensor->type != GGML_TYPE_F32) {
        probe_refuse(name, std::string("is of type ") + ggml_type_name(tensor->type) + ", not f32");
    }
    if (tensor->ne[0] != ne0 || tensor->ne[1] != ne1 || tensor->ne[2] != 1 || tensor->ne[3] != 1) {
        probe_refuse(name, "has shape " + llama_format_tensor_shape(tensor) + ", not " + std::to_string(ne0) + " x " +
                               std::to_string(ne1));
    }
    if (ml.files.empty()) {
        probe_refuse(name, "is a probe: such a model is loaded from files only");
    }
    std::vector<char> values(ggml_nbytes(tensor));
    llama_file &      file = *ml.files.at(weight.idx);
    file.seek(weight.offs, SEEK_SET);
    file.read_raw(values.data(), values.size());
    const float * numbers = reinterpret_cast<const float *>(values.data());
    if (!std::all_of(numbers, numbers + ggml_nelements(tensor), [](float x) { return std::isfinite(x); })) {
        probe_refuse(name, "holds a value that is not finite");
    }
    // As upstream's create_tensor counts a tensor that it leaves out of its own buffers.
    ml.n_created++;
    ml.size_data -= ggml_nbytes(tensor);
    return values;
}

// The matrix whose product makes a layer's K; null where there is none.
const ggml_tensor * probe_reads(const std::unordered_map<std::string, const ggml_tensor *> & loaded, uint32_t il) {
    for (const char * matrix : { "attn_k", "attn_qkv" }) {
        const auto found = loaded.find("blk." + std::to_string(il) + "." + matrix + ".weight");
        if (found != loaded.end()) {
            return found->second;
        }
    }
    return nullptr;
}

}  // namespace

ggml_ext_kv_probes ggml_ext_kv_load_probes(llama_model_loader & ml, const llama_model & model,
                                           const std::unordered_map<std::string, const ggml_tensor *> & loaded) {
    ggml_ext_kv_probes    probes;
    std::set<std::string> names;
    for (const auto & [name, weight] : ml.weights_map) {
        if (name.find(".kv_probe") != std::string::npos) {
            names.insert(name);
        }
    }
    if (names.empty()) {
        return probes;
    }
    const llama_hparams &          hparams = model.hparams;
    std::vector<std::vector<char>> values;
    probes.layers.resize(hparams.n_layer_all);
    probes.context.reset(ggml_init({ 2 * hparams.n_layer_all * ggml_tensor_overhead(), nullptr, /*no_alloc =*/true }));
    for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
        const std::string name = "blk." + std::to_string(il) + ".attn_k.kv_probe", bias = name + "_b";
        if (names.erase(name) + names.erase(bias) == 0) {
            continue;
        }
        ggml_ext_kv_probe & probe = probes.layers[il];
        probe.reads               = hparams.is_mla() || !hparams.has_kv(il) ? nullptr : probe_reads(loaded, il);
        if (!probe.reads) {
            probe_refuse(name, "is of a layer that makes no keys of its own from a matrix");
        }
        const int64_t n = probe.reads->ne[0], n_head = hparams.n_head_kv(il);
        values.push_back(probe_values(ml, name, n, n_head));
        values.push_back(probe_values(ml, bias, n_head, 1));
        probe.weight = ggml_new_tensor_2d(probes.context.get(), GGML_TYPE_F32, n, n_head);
        probe.bias   = ggml_new_tensor_1d(probes.context.get(), GGML_TYPE_F32, n_head);
        ggml_set_name(probe.weight, name.c_str());
        ggml_set_name(probe.bias, bias.c_str());
    }
    if (!names.empty()) {
        probe_refuse(*names.begin(), "is a probe of no layer of this model");
    }
    probes.buffer = ggml_ext_kv_weights(probes.context.get(), values, !ml.no_alloc, "probes");
    return probes;
}
