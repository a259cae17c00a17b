// Precision of activations: key, environment variable, and which weights it concerns.

#pragma once

#include <cstdint>
#include <string>

struct gguf_context;
struct ggml_tensor;

struct ggml_ext_activation {
    uint32_t bits  = 8;        // 8: llama.cpp's own rounding, nothing is added
    uint32_t group = 0;        // values that share a scale, 0 for a whole token; with 4 bits only

    std::string name() const;  // as in GGML_EXT_ACT: "a8", "a4", "a4/32", "a4/256"
};

// GGML_EXT_ACT where it is set, else the file's keys, else 8 bits. Throws std::runtime_error, which
// names the variable, for another value than those above. The keys have been checked.
ggml_ext_activation ggml_ext_read_activation(const gguf_context * metadata);

// Whether a weight's input is rounded when bits is 4: quantised matrices of the blocks, but not the
// router of a mixture of experts.
bool ggml_ext_rounds_input(const ggml_tensor * weight);
