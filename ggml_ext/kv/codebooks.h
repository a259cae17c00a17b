// Codebooks for the old tokens of a paged cache, from the model's file. docs/kv-cache.md has the mathematics, docs/gguf.md
// the tensors.

#pragma once

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#include <map>
#include <vector>

struct llama_model;
struct llama_model_loader;

struct ggml_ext_kv_codebooks {
    // By channels of a code, 4 or 8, then by layer: I8 as kv_code/cold.h lays books out; null where the file has none.
    std::map<int, std::vector<ggml_tensor *>> layers;
    ggml_context_ptr                          context;
    ggml_backend_buffer_ptr                   buffer;
};

// Reads all codebooks of a file into the CPU's memory, their words rounded to 8 bits: K's with a scale of each place, V's
// with one of 32 channels. Throws std::runtime_error, which names the tensor, for one that is not finite, of another shape
// or type, without its other half, or of a layer without a cache of its own.
ggml_ext_kv_codebooks ggml_ext_kv_load_codebooks(llama_model_loader & ml, const llama_model & model);
