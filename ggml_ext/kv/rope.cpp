#include "rope.h"

#include "ggml-backend.h"
#include "ggml-ext.h"
#include "kv_code/cold.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace {

// Of ggml_rope_ext, in op_params.
struct rope_params {
    int32_t n_past, n_dims, mode, n_ctx, n_ctx_orig;
    float   freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow;
};

// Ones where there are none, and where the model has no memory, so that its graphs are measured and never computed.
std::vector<float> factors_of(const ggml_tensor * factors, int n) {
    std::vector<float> values(n, 1.0f);
    if (factors && (factors->type != GGML_TYPE_F32 || factors->ne[0] < n || factors->op != GGML_OP_NONE)) {
        throw std::runtime_error("ggml-ext: the frequency factors of RoPE are no weights, and codes cannot undo it");
    }
    if (factors && factors->data && factors->buffer) {
        ggml_backend_tensor_get(factors, values.data(), 0, values.size() * sizeof(float));
    } else if (factors && factors->data) {
        std::memcpy(values.data(), factors->data, values.size() * sizeof(float));
    }
    return values;
}

}  // namespace

ggml_ext_kv_rope ggml_ext_kv_rope_of(const ggml_tensor * key) {
    while (key->op == GGML_OP_VIEW || key->op == GGML_OP_RESHAPE || key->op == GGML_OP_CONT) {
        key = key->src[0];
    }
    ggml_ext_kv_rope rope;
    if (key->op != GGML_OP_ROPE) {
        return rope;
    }
    rope_params p;
    std::memcpy(&p, key->op_params, sizeof(p));
    if (p.mode != GGML_ROPE_TYPE_NORMAL && p.mode != GGML_ROPE_TYPE_NEOX) {
        throw std::runtime_error("ggml-ext: RoPE of mode " + std::to_string(p.mode) + " cannot be undone for codes");
    }
    rope.n_rot  = p.n_dims;
    rope.neox   = p.mode == GGML_ROPE_TYPE_NEOX;
    rope.length = p.attn_factor;
    float corrected[2];
    ggml_rope_yarn_corr_dims(p.n_dims, p.n_ctx_orig, p.freq_base, p.beta_fast, p.beta_slow, corrected);
    if (p.ext_factor != 0) {
        rope.length *= 1 + 0.1f * std::log(1 / p.freq_scale);
    }
    const std::vector<float> factors = factors_of(key->src[2], p.n_dims / 2);
    for (int i = 0; i < p.n_dims / 2; ++i) {
        const double extrapolated = std::pow(double(p.freq_base), -2.0 * i / p.n_dims) / factors[i];
        const double interpolated = p.freq_scale * extrapolated;
        const double ramp         = (i - corrected[0]) / std::max(0.001, double(corrected[1]) - double(corrected[0]));
        const double mix          = p.ext_factor * (1 - std::clamp(ramp, 0.0, 1.0));
        rope.frequency.push_back(interpolated * (1 - mix) + extrapolated * mix);
    }
    return rope;
}

void ggml_ext_kv_angles(const ggml_ext_kv_rope & rope, float * data) {
    const int n = rope.n_rot / 2;
    for (int row = 0; row < 2 * GGML_EXT_KV_TURN; ++row) {
        const double position = row < GGML_EXT_KV_TURN ? row : double(row - GGML_EXT_KV_TURN) * GGML_EXT_KV_TURN;
        for (int i = 0; i < n; ++i) {
            data[size_t(row) * rope.n_rot + i]     = float(std::cos(position * rope.frequency[i]));
            data[size_t(row) * rope.n_rot + n + i] = float(std::sin(position * rope.frequency[i]));
        }
    }
}

int32_t ggml_ext_rope_of(const ggml_tensor * tensor, double * frequencies, int32_t * adjacent, float * length) {
    try {
        const ggml_ext_kv_rope rope = ggml_ext_kv_rope_of(tensor);
        std::copy(rope.frequency.begin(), rope.frequency.end(), frequencies);
        *adjacent = !rope.neox;
        *length   = rope.length;
        return rope.n_rot;
    } catch (const std::exception &) {
        return GGML_EXT_E_TYPE;
    }
}
