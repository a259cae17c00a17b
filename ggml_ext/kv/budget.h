// What stands beneath a cache: a budget of cells (policy window), or pages in place of its tensors.

#pragma once

#include "paged.h"

#include <cstdint>
#include <memory>
#include <vector>

class llama_kv_cells;

struct ggml_ext_kv {
    const std::vector<llama_kv_cells> * cells = nullptr;  // the cache's, by stream

    // Policy window.
    llama_pos sink   = 0;                      // a sequence's positions below stay
    llama_pos recent = 0;                      // as do so many of the latest
    uint32_t  n_seq  = 0;                      // sequences that share a stream's cells
    bool      evicts = false;                  // while ggml_ext_kv_begin removes cells

    std::unique_ptr<ggml_ext_kv_paged> paged;  // or null: then it is the budget that counts
};
