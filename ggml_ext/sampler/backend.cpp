#include "backend.h"

#include "core/ext_op.h"
#include "ggml-cpp.h"
#include "llama.h"

#include <algorithm>
#include <cmath>

namespace ggml_ext_sampling {

namespace {

// A vocabulary like those of today's models; what a device supports does not depend on it.
constexpr int64_t probed_vocabulary = 128 * 1024;

// The op's order is that of the stages' numbers, without typical.
bool op_has(const ggml_ext_sampler_params & params) {
    int32_t before = -1;
    for (int32_t i = 0; i < params.n_stages; i++) {
        const int32_t stage = params.stages[i];
        if (stage == GGML_EXT_SAMPLER_TYPICAL) {
            if (params.typical_p < 1) {
                return false;
            }
        } else if (stage < before) {
            return false;
        } else {
            before = stage;
        }
    }
    return true;
}

bool lists(const ggml_ext_sampler_params & params, ggml_ext_sampler_stage stage) {
    return std::find(params.stages, params.stages + params.n_stages, int32_t(stage)) != params.stages + params.n_stages;
}

bool device_has_op(ggml_backend_buffer_type_t buft) {
    ggml_backend_dev_t device = ggml_backend_buft_get_device(buft);
    if (!device) {
        return true;  // the processor's memory
    }
    const ggml_context_ptr ctx{ ggml_init({ 8 * ggml_tensor_overhead(), nullptr, true }) };
    ggml_tensor *          logits = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, probed_vocabulary);
    ggml_tensor *          words  = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, GGML_EXT_SAMPLE_WORDS);
    return ggml_backend_dev_supports_op(device, ggml_ext_sample(ctx.get(), logits, words, nullptr));
}

}  // namespace

const char * backend_obstacle(const ggml_ext_sampler_params & params, ggml_backend_buffer_type_t buft) {
    if (!op_has(params)) {
        return "its stages are not top-k, top-p, min-p, temperature in this order";
    }
    if (ggml_backend_dev_t device = ggml_backend_buft_get_device(buft);
        device && ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_META) {
        return "--split-mode tensor cannot run the op EXT sample";
    }
    return device_has_op(buft) ? nullptr : "the device lacks the op EXT sample";
}

ggml_tensor * backend_add(ggml_context * ctx, llama_sampler_data * data) {
    ggml_tensor * parameters = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, GGML_EXT_SAMPLE_WORDS);
    ggml_set_name(parameters, "fused_parameters");
    ggml_set_input(parameters);
    // Its memory is nobody else's, so that the samplers of all sequences can run at once.
    ggml_set_output(parameters);

    const int64_t n      = ggml_nelements(data->logits);
    ggml_tensor * logits = ggml_reshape_1d(ctx, data->logits, n);
    ggml_tensor * ids    = data->candidates ? ggml_reshape_1d(ctx, data->candidates, n) : nullptr;
    *data                = {};
    data->sampled        = ggml_ext_sample(ctx, logits, parameters, ids);
    data->logits         = ggml_view_1d(ctx, logits, 1, 0);
    ggml_set_name(data->sampled, "fused_token");
    return parameters;
}

void backend_set(ggml_tensor * parameters, const ggml_ext_sampler_params & params, double u) {
    const bool             top_p = lists(params, GGML_EXT_SAMPLER_TOP_P);
    const bool             min_p = lists(params, GGML_EXT_SAMPLER_MIN_P) && params.min_p > 0;
    ggml_ext_sample_params words;
    words.top_k       = lists(params, GGML_EXT_SAMPLER_TOP_K) ? params.top_k : 0;
    words.top_p       = top_p ? params.top_p : 1.0f;
    words.log_min_p   = min_p ? std::log(double(params.min_p)) : -INFINITY;
    words.min_keep    = int32_t(std::min<size_t>(params.min_keep, INT32_MAX));
    words.temperature = lists(params, GGML_EXT_SAMPLER_TEMPERATURE) ? params.temperature : 1.0f;
    words.uniform     = uint64_t(u * 0x1p64);
    ggml_backend_tensor_set(parameters, &words, 0, sizeof(words));
}

}  // namespace ggml_ext_sampling
