// What sequences hold in a context's cache of ours, for those who watch it. docs/kv-cache.md has the words.

#pragma once

#include "llama.h"

#include <cstddef>
#include <string>

struct ggml_ext_kv_usage {
    const char * policy = nullptr;  // as GGML_EXT_KV names it; null: the context has no cache of ours

    // Tokens that the sequence has in the cache; of them, as a mean over heads, those stored as rows, as codes, and
    // evicted; and of rows and codes those that another sequence sees, too.
    double tokens = 0, rows = 0, codes = 0, evicted = 0, shared = 0;

    size_t bytes = 0;  // of the blocks or cells that it sees, shared ones in full
};

ggml_ext_kv_usage ggml_ext_kv_usage_of(llama_context * ctx, llama_seq_id s);

// Notes what sequences 0 .. n - 1 hold, and says what was noted last, as Prometheus reads it (exposition format 0.0.4).
// Several threads may ask. Empty where there is no cache of ours.
void        ggml_ext_kv_note_usage(llama_context * ctx, size_t n);
std::string ggml_ext_kv_noted_usage();
