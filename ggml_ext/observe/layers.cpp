// A model's token embeddings and the outputs of its blocks, seen through the scheduler's eval callback; ggml-ext.h documents the
// functions.
//
// Why the callback may overwrite an output: ggml_backend_sched_compute_splits (ggml-backend.cpp) runs
// the nodes up to one that was asked for, synchronises, and calls back before it submits the next node
// or copies the tensor to another backend. Until then the tensor's memory is its own: the allocator
// hands it on at the last node that reads it, which comes later.

#include "ggml-backend.h"
#include "ggml-ext.h"
#include "ggml.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <vector>

struct ggml_ext_layers {
    int32_t n_layer;
    int64_t n_embd;

    ggml_ext_layers_mode mode     = GGML_EXT_LAYERS_RECORD;
    float *              outputs  = nullptr;
    int64_t              n_tokens = 0;
    int64_t              n_skip   = 0;

    bool                bad_shape = false;
    std::vector<bool>   seen;
    std::vector<double> error;
    std::vector<double> signal;
    std::vector<float>  values;  // one block's output, [n_tokens][n_embd]

    ggml_ext_layers(int32_t n_layer, int64_t n_embd) : n_layer(n_layer), n_embd(n_embd) {}
};

namespace {

constexpr char prefix[] = "l_out-";

// Where a tensor stands in the array: 0 for the token embeddings, 1 + block for "l_out-<block>", whose
// views and copies have longer names; else -1.
int32_t slot_of(const ggml_ext_layers & layers, const ggml_tensor * tensor) {
    if (tensor->op == GGML_OP_GET_ROWS && std::strcmp(tensor->src[0]->name, "token_embd.weight") == 0) {
        return 0;
    }
    if (std::strncmp(tensor->name, prefix, sizeof(prefix) - 1) != 0) {
        return -1;
    }
    const char * digits = tensor->name + sizeof(prefix) - 1;
    char *       end    = nullptr;
    const long   number = std::strtol(digits, &end, 10);
    return end != digits && *end == '\0' && number >= 0 && number < layers.n_layer ? 1 + int32_t(number) : -1;
}

void add_squares(ggml_ext_layers & layers, int32_t slot, const float * base, const float * values, int64_t n) {
    double error  = 0;
    double signal = 0;
    for (int64_t i = 0; i < n; i++) {
        const double difference = double(values[i]) - double(base[i]);
        error += difference * difference;
        signal += double(base[i]) * double(base[i]);
    }
    layers.error[slot]  = error;
    layers.signal[slot] = signal;
}

void measure(ggml_ext_layers & layers, int32_t slot, ggml_tensor * tensor) {
    // The last block may have been computed for the tokens with logits only (inp_out_ids).
    const int64_t first = tensor->ne[1] == layers.n_tokens ? 0 : layers.n_skip;
    const int64_t n     = layers.n_embd * (layers.n_tokens - first);
    if (layers.seen[slot] || tensor->type != GGML_TYPE_F32 || !ggml_is_contiguous(tensor) ||
        tensor->ne[0] != layers.n_embd || ggml_nelements(tensor) != n) {
        layers.bad_shape = true;
        return;
    }
    layers.seen[slot] = true;

    float * base = layers.outputs + (slot * layers.n_tokens + first) * layers.n_embd;
    if (layers.mode == GGML_EXT_LAYERS_RECORD) {
        ggml_backend_tensor_get(tensor, base, 0, n * sizeof(float));
        return;
    }
    ggml_backend_tensor_get(tensor, layers.values.data(), 0, n * sizeof(float));
    const int64_t skip = layers.n_embd * (layers.n_skip - first);
    add_squares(layers, slot, base + skip, layers.values.data() + skip, n - skip);
    if (layers.mode == GGML_EXT_LAYERS_FORCED) {
        ggml_backend_tensor_set(tensor, base, 0, n * sizeof(float));
    }
}

}  // namespace

ggml_ext_layers * ggml_ext_layers_new(int32_t n_layer, int64_t n_embd) {
    if (n_layer < 1 || n_embd < 1) {
        return nullptr;
    }
    try {
        return new ggml_ext_layers(n_layer, n_embd);
    } catch (const std::exception &) {
        return nullptr;
    }
}

void ggml_ext_layers_free(ggml_ext_layers * layers) {
    delete layers;
}

int32_t ggml_ext_layers_begin(ggml_ext_layers * layers, int32_t mode, float * outputs, int64_t n_tokens,
                              int64_t n_skip) {
    if (mode < GGML_EXT_LAYERS_RECORD || mode > GGML_EXT_LAYERS_FORCED) {
        return GGML_EXT_E_TYPE;
    }
    if (n_skip < 0 || n_skip >= n_tokens) {
        return GGML_EXT_E_SHAPE;
    }
    try {
        layers->values.resize(n_tokens * layers->n_embd);
        layers->seen.assign(1 + layers->n_layer, false);
        layers->error.assign(1 + layers->n_layer, 0);
        layers->signal.assign(1 + layers->n_layer, 0);
    } catch (const std::exception &) {
        return GGML_EXT_E_MEMORY;
    }
    layers->mode      = ggml_ext_layers_mode(mode);
    layers->outputs   = outputs;
    layers->n_tokens  = n_tokens;
    layers->n_skip    = n_skip;
    layers->bad_shape = false;
    return 0;
}

bool ggml_ext_layers_eval(ggml_tensor * tensor, bool ask, void * user_data) {
    ggml_ext_layers & layers = *static_cast<ggml_ext_layers *>(user_data);
    const int32_t     slot   = slot_of(layers, tensor);
    if (ask) {
        return slot >= 0;
    }
    measure(layers, slot, tensor);
    return slot != layers.n_layer;
}

int32_t ggml_ext_layers_sums(const ggml_ext_layers * layers, double * error, double * signal) {
    if (layers->bad_shape) {
        return GGML_EXT_E_SHAPE;
    }
    int32_t n_seen = 0;
    for (size_t slot = 0; slot < layers->seen.size(); slot++) {
        error[slot]  = layers->error[slot];
        signal[slot] = layers->signal[slot];
        n_seen += layers->seen[slot];
    }
    return n_seen;
}
