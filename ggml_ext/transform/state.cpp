// Saved states: a cache's rows are in the basis of the model that made them, so they carry the digest of its
// transforms. A model without any writes what stock llama.cpp writes.

#include "llama-io.h"
#include "llama-model.h"
#include "transform.h"

#include <cstdint>
#include <stdexcept>

namespace {

// Stands where stock llama.cpp has a number of streams, which is at most 256: it refuses such a state.
constexpr uint32_t marker = 0x54584747;  // "GGXT"

}  // namespace

void ggml_ext_llama_write_state(const llama_model & model, llama_io_write_i & io) {
    if (model.ggml_ext && model.ggml_ext->digest != 0) {
        io.write(&marker, sizeof(marker));
        io.write(&model.ggml_ext->digest, sizeof(model.ggml_ext->digest));
    }
}

void ggml_ext_llama_read_state(const llama_model & model, llama_io_read_i & io) {
    if (!model.ggml_ext || model.ggml_ext->digest == 0) {
        return;
    }
    uint32_t first  = 0;
    uint64_t digest = 0;
    io.read(&first, sizeof(first));
    if (first != marker) {
        throw std::runtime_error(
            "ggml-ext: the state was saved by a model without transforms; process the prompt anew");
    }
    io.read(&digest, sizeof(digest));
    if (digest != model.ggml_ext->digest) {
        throw std::runtime_error(
            "ggml-ext: the state was saved by a model with other transforms; process the prompt anew");
    }
}
