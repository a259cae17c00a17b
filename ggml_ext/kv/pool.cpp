#include "pool.h"

#include "llama-cparams.h"

#include <stdexcept>
#include <string>

ggml_ext_kv_pages ggml_ext_kv_pool::allocate(const char * name, size_t block_size, uint32_t n_lists, uint64_t n_blocks,
                                             bool alloc) {
    if (n_blocks > INT32_MAX / GGML_EXT_KV_SLOTS) {
        throw std::runtime_error(std::string("ggml-ext: ") + name + ": " + std::to_string(n_blocks) +
                                 " blocks of a paged KV cache, at most " +
                                 std::to_string(INT32_MAX / GGML_EXT_KV_SLOTS) + "; lower the budget or -c");
    }
    context.reset(ggml_init({ ggml_tensor_overhead(), nullptr, /*no_alloc =*/true }));
    blocks = ggml_new_tensor_2d(context.get(), GGML_TYPE_I8, int64_t(block_size), int64_t(n_blocks));
    ggml_set_name(blocks, name);
    const ggml_backend_buffer_type_t type = ggml_backend_cpu_buffer_type();
    if (alloc) {
        buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(context.get(), type));
    } else {
        buffer.reset(ggml_backend_buft_alloc_buffer(type, 0));
        blocks->buffer = buffer.get();
    }
    if (!buffer) {
        throw std::runtime_error(std::string("ggml-ext: ") + name + ": no memory for " +
                                 std::to_string(ggml_nbytes(blocks) >> 20) +
                                 " MiB of a paged KV cache; lower the budget or -c");
    }
    ggml_ext_kv_pages pages(LLAMA_MAX_SEQ, n_lists, uint32_t(n_blocks));
    pages.keep_positions(static_cast<int32_t *>(blocks->data), block_size / sizeof(int32_t));
    return pages;
}
