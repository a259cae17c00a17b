// Probes of policy "probe": what each key is likely to be worth to later tokens, read off what the key is made from.
// docs/kv-cache.md has the mathematics, docs/gguf.md the tensors.

#pragma once

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#include <string>
#include <unordered_map>
#include <vector>

struct llama_model;
struct llama_model_loader;

// Of a layer; its scores are weight^T x + bias, where x [n, n_tokens] is what the product that makes K reads.
struct ggml_ext_kv_probe {
    const ggml_tensor * reads  = nullptr;  // the matrix of that product
    ggml_tensor *       weight = nullptr;  // F32 [n, n_head_kv]
    ggml_tensor *       bias   = nullptr;  // F32 [n_head_kv]
};

struct ggml_ext_kv_probes {
    std::vector<ggml_ext_kv_probe> layers;  // by layer, empty where the file has none
    ggml_context_ptr               context;
    ggml_backend_buffer_ptr        buffer;
};

// Reads all probes of a file into the CPU's memory. loaded: the weights by name. Throws std::runtime_error, which names the
// tensor, for one that is not finite, of another shape or type, without its bias, or of a layer that makes no K of its own.
ggml_ext_kv_probes ggml_ext_kv_load_probes(llama_model_loader & ml, const llama_model & model,
                                           const std::unordered_map<std::string, const ggml_tensor *> & loaded);
