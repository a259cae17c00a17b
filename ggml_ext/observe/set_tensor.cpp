// Other weights in a loaded model: what a change of one matrix does to the logits. See ggml-ext.h.

#include "ggml-backend.h"
#include "ggml-ext.h"
#include "llama-model.h"

#include <cstring>

int32_t ggml_ext_model_set_tensor(struct llama_model * model, const char * name, const void * data, int64_t offset,
                                  int64_t size) {
    int32_t n_set = 0;
    for (const auto & [its_name, tensor] : llama_internal_get_tensor_map(model)) {
        if (its_name != name) {
            continue;
        }
        // A mapped file cannot be written to, and a buffer that packs rows takes whole tensors of the file's layout.
        if (!tensor->buffer || std::strcmp(ggml_backend_buffer_name(tensor->buffer), "CPU_Mapped") == 0) {
            return GGML_EXT_E_TYPE;
        }
        if (offset < 0 || size < 0 || offset + size > (int64_t) ggml_nbytes(tensor)) {
            return GGML_EXT_E_SHAPE;
        }
        ggml_backend_tensor_set(tensor, data, (size_t) offset, (size_t) size);
        n_set++;
    }
    return n_set > 0 ? 0 : GGML_EXT_E_TYPE;
}
