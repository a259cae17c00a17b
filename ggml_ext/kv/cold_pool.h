// The blocks of a paged cache's old tokens, in coupled codes. docs/kv-cache.md explains them.

#pragma once

#include "core/ext_op.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"
#include "pages.h"
#include "pool.h"
#include "rope.h"

#include <cstdint>
#include <vector>

class ggml_ext_kv_cold_pool {
  public:
    // From a slot of the rows' pool to one of this, of a head of a layer.
    struct move {
        int32_t from, to, head;
    };

    // channels: of a code; scored: whether slots have scores; n_threads: that code.
    ggml_ext_kv_cold_pool(int channels, bool scored, int n_threads);

    // The cache's next layer; books: its codebooks.
    void add(int32_t dk, int32_t dv, int32_t n_head_kv, ggml_tensor * books);

    // Makes the blocks once all layers are there. Without alloc they have their size and no memory. Throws
    // std::runtime_error where the memory cannot be had.
    void allocate(uint64_t n_blocks, bool alloc);

    // How a layer's keys are turned, read off the first graph that makes them. Throws std::runtime_error for a form that
    // cannot be undone, and for another one than before.
    void turned(uint32_t layer, const ggml_tensor * key);

    // What kv_attend wants of a layer whose keys are known.
    ggml_ext_kv_codes codes_of(uint32_t layer) const;

    // Codes of slots of `rows`, by layer; done when it returns.
    void encode(ggml_tensor * rows, const std::vector<std::vector<move>> & moves) const;

    float * score(uint32_t layer, int32_t slot) const;

    // A slot's codes, score and position become another one's.
    void move_slot(uint32_t layer, int32_t from, int32_t to) const;

    // K's or V's codes of a slot.
    char * codes(uint32_t layer, bool v, int32_t slot) const;
    size_t codes_size(uint32_t layer, bool v) const;

    size_t size() const { return blocks.size(); }

    size_t block_bytes() const { return block_size; }

    ggml_ext_kv_pages pages{ 0, 0, 0 };

    const int channels;

  private:
    struct layer {
        int32_t       dk, dv, n_head_kv;
        ggml_tensor * books;
        int           angles = -1;  // index into `turns`; -1: not known yet
    };

    struct turn {
        ggml_ext_kv_rope        rope;
        ggml_context_ptr        context;
        ggml_backend_buffer_ptr buffer;
        ggml_tensor *           angles = nullptr;
    };

    ggml_ext_kv_cold_block  block_of(const layer & layer) const;
    ggml_ext_kv_cold_params params_of(const layer & layer) const;

    const bool         scored;
    std::vector<layer> layers;
    std::vector<turn>  turns;
    uint32_t           lists      = 0;
    size_t             block_size = 0;  // of the largest layer
    ggml_ext_kv_pool   blocks;
    ggml_backend_ptr   backend;
};
