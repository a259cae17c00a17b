// The memory of a paged cache's blocks, of rows or of codes.

#pragma once

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"
#include "pages.h"

#include <cstddef>
#include <cstdint>

class ggml_ext_kv_pool {
  public:
    // Makes n_blocks blocks of `block_size` bytes, and the empty pages of n_lists lists that keep their positions there.
    // name: the tensor's. Without alloc it has its size and no memory. Throws std::runtime_error where there are more
    // blocks than slots can be numbered, or the memory cannot be had.
    ggml_ext_kv_pages allocate(const char * name, size_t block_size, uint32_t n_lists, uint64_t n_blocks, bool alloc);

    // I8 [block_size, n_blocks]; null before allocate.
    ggml_tensor * tensor() const { return blocks; }

    size_t size() const { return blocks ? ggml_nbytes(blocks) : 0; }

    // The block that has a slot.
    char * block_of(int32_t slot) const {
        return static_cast<char *>(blocks->data) + size_t(slot / GGML_EXT_KV_SLOTS) * blocks->nb[1];
    }

  private:
    ggml_context_ptr        context;
    ggml_backend_buffer_ptr buffer;
    ggml_tensor *           blocks = nullptr;
};
