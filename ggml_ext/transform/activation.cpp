#include "activation.h"

#include "ggml.h"
#include "gguf.h"

#include <cstdlib>
#include <stdexcept>

namespace {

const ggml_ext_activation choices[] = {
    { 8, 0   },
    { 4, 0   },
    { 4, 32  },
    { 4, 256 },
};

uint32_t value_or(const gguf_context * metadata, const char * key, uint32_t fallback) {
    const int64_t id = gguf_find_key(metadata, key);
    return id < 0 ? fallback : gguf_get_val_u32(metadata, id);
}

}  // namespace

std::string ggml_ext_activation::name() const {
    return bits == 4 && group != 0 ? "a4/" + std::to_string(group) : "a" + std::to_string(bits);
}

ggml_ext_activation ggml_ext_read_activation(const gguf_context * metadata) {
    if (const char * name = std::getenv("GGML_EXT_ACT")) {
        for (const ggml_ext_activation & choice : choices) {
            if (choice.name() == name) {
                return choice;
            }
        }
        throw std::runtime_error(std::string("ggml-ext: environment variable GGML_EXT_ACT is '") + name +
                                 "'; set it to a8, a4, a4/32 or a4/256");
    }
    return { value_or(metadata, "ggml_ext.activation.bits", 8), value_or(metadata, "ggml_ext.activation.group", 0) };
}

bool ggml_ext_rounds_input(const ggml_tensor * weight) {
    const std::string name   = weight->name;
    const std::string ending = ".weight";
    return ggml_is_quantized(weight->type) && name.rfind("blk.", 0) == 0 && name.size() > ending.size() &&
           name.compare(name.size() - ending.size(), ending.size(), ending) == 0 &&
           name.find(".ffn_gate_inp") == std::string::npos;
}
