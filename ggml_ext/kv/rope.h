// What RoPE has done to keys, read off the graph, and the angles by which coupled codes undo it.

#pragma once

#include "ggml-cpp.h"
#include "ggml.h"

#include <string>
#include <vector>

struct ggml_ext_kv_rope {
    int                 n_rot  = 0;      // channels of a head that are turned, the first ones; 0: none
    bool                neox   = false;  // channel i with i + n_rot / 2, else 2 i with 2 i + 1
    float               length = 1;      // by which keys are multiplied beside
    std::vector<double> frequency;       // [n_rot / 2], radians per position

    bool operator==(const ggml_ext_kv_rope & other) const {
        return n_rot == other.n_rot && neox == other.neox && length == other.length && frequency == other.frequency;
    }
};

// RoPE whose result a key is, or a view of it; without RoPE right before it nothing is turned. As ggml_rope_ext computes
// it, YaRN and frequency factors included (ggml/src/ggml-cpu/ops.cpp, rope_yarn). Throws std::runtime_error for positions of
// several dimensions, and for frequency factors that the graph computes.
ggml_ext_kv_rope ggml_ext_kv_rope_of(const ggml_tensor * key);

// Cosines and sines as kv_code/cold.h wants them; data: [2 * GGML_EXT_KV_TURN][n_rot].
void ggml_ext_kv_angles(const ggml_ext_kv_rope & rope, float * data);
