#include "factors.h"

#include "llama-mmap.h"

#include <cmath>
#include <cstdio>
#include <stdexcept>

void ggml_ext_refuse_tensor(const std::string & name, const std::string & why) {
    throw std::runtime_error("ggml-ext: tensor '" + name + "' " + why);
}

ggml_ext_factor_file::ggml_ext_factor_file(llama_model_loader & ml) : ml(ml) {
    for (const auto & [name, weight] : ml.weights_map) {
        if (name.find(".fq_") != std::string::npos) {
            names.insert(name);
        }
    }
}

ggml_ext_factor ggml_ext_factor_file::take(const std::string & name) {
    ggml_ext_factor factor;
    if (names.erase(name) == 0) {
        return factor;
    }
    const auto &        weight = ml.require_weight(name.c_str());
    const ggml_tensor * tensor = weight.tensor;
    if (tensor->type != GGML_TYPE_F32 && tensor->type != GGML_TYPE_F16) {
        ggml_ext_refuse_tensor(name, std::string("is of type ") + ggml_type_name(tensor->type) + ", not f32 or f16");
    }
    if (tensor->ne[0] < 1 || tensor->ne[0] != tensor->ne[1] || tensor->ne[2] != 1 || tensor->ne[3] != 1) {
        ggml_ext_refuse_tensor(name, "has shape " + llama_format_tensor_shape(tensor) + ", not a square matrix");
    }
    factor.name  = name;
    factor.order = tensor->ne[0];
    factor.data.resize(ggml_nelements(tensor));

    std::vector<ggml_fp16_t> half(tensor->type == GGML_TYPE_F16 ? factor.data.size() : 0);
    llama_file &             file = *ml.files.at(weight.idx);
    file.seek(weight.offs, SEEK_SET);
    file.read_raw(half.empty() ? static_cast<void *>(factor.data.data()) : half.data(), ggml_nbytes(tensor));
    if (!half.empty()) {
        ggml_fp16_to_fp32_row(half.data(), factor.data.data(), half.size());
    }
    for (const float value : factor.data) {
        if (!std::isfinite(value)) {
            ggml_ext_refuse_tensor(name, "holds a value that is not finite");
        }
    }
    // As upstream's create_tensor counts a tensor that it leaves out of its own buffers.
    ml.n_created++;
    ml.size_data -= ggml_nbytes(tensor);
    return factor;
}

ggml_tensor * ggml_ext_factor_buffers::add(const ggml_ext_factor & factor, ggml_backend_buffer_type_t type) {
    if (!factor) {
        return nullptr;
    }
    const ggml_init_params params = { ggml_tensor_overhead(), nullptr, /*no_alloc =*/true };
    ggml_context_ptr       context(ggml_init(params));
    ggml_tensor *          tensor = ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, factor.order, factor.order);
    ggml_set_name(tensor, factor.name.c_str());
    pending[type].emplace_back(std::move(context), factor.data);
    return tensor;
}

void ggml_ext_factor_buffers::upload(bool no_alloc, std::vector<ggml_context_ptr> & contexts,
                                     std::vector<ggml_backend_buffer_ptr> & buffers) {
    for (auto & [type, factors] : pending) {
        for (auto & [context, data] : factors) {
            ggml_backend_buffer_ptr buffer(no_alloc ? ggml_backend_buft_alloc_buffer(type, 0) :
                                                      ggml_backend_alloc_ctx_tensors_from_buft(context.get(), type));
            ggml_tensor *           tensor = ggml_get_first_tensor(context.get());
            if (!buffer) {
                ggml_ext_refuse_tensor(tensor->name, std::string("finds no memory in ") + ggml_backend_buft_name(type));
            }
            ggml_backend_buffer_set_usage(buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
            if (no_alloc) {
                tensor->buffer = buffer.get();  // as upstream marks weights that the scheduler must not allocate
            } else {
                ggml_backend_tensor_set(tensor, data.data(), 0, ggml_nbytes(tensor));
            }
            contexts.push_back(std::move(context));
            buffers.push_back(std::move(buffer));
        }
    }
    pending.clear();
}
