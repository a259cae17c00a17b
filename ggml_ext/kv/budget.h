// The budget of one cache.

#pragma once

#include "llama.h"

#include <cstdint>

struct ggml_ext_kv {
    llama_pos sink;            // a sequence's positions below stay
    llama_pos recent;          // as do so many of the latest
    uint32_t  n_seq;           // sequences that share a stream's cells
    bool      evicts = false;  // while ggml_ext_kv_begin removes cells
};
