#include "weights.h"

#include "ggml-backend.h"

#include <stdexcept>
#include <string>

ggml_backend_buffer_ptr ggml_ext_kv_weights(ggml_context * context, const std::vector<std::vector<char>> & values,
                                            bool alloc, const char * what) {
    const ggml_backend_buffer_type_t type = ggml_backend_cpu_buffer_type();
    ggml_backend_buffer_ptr          buffer(alloc ? ggml_backend_alloc_ctx_tensors_from_buft(context, type) :
                                                    ggml_backend_buft_alloc_buffer(type, 0));
    if (!buffer) {
        throw std::runtime_error(std::string("ggml-ext: no memory for the ") + what + " of the KV cache");
    }
    ggml_backend_buffer_set_usage(buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    size_t i = 0;
    for (ggml_tensor * tensor = ggml_get_first_tensor(context); tensor;
         tensor               = ggml_get_next_tensor(context, tensor), ++i) {
        if (alloc) {
            ggml_backend_tensor_set(tensor, values[i].data(), 0, values[i].size());
        } else {
            tensor->buffer = buffer.get();
        }
    }
    return buffer;
}
