// Saved states of a cache with a budget: positions may be missing, which stock llama.cpp, and a cache without a budget,
// would take for a whole prompt.

#include "budget.h"
#include "hooks.h"
#include "llama-io.h"

#include <stdexcept>

// Stands where upstream has a number of streams, which is at most 256: it refuses such a state.
static constexpr uint32_t kv_marker = 0x4b584747;  // "GGXK"

void ggml_ext_kv_write_state(const ggml_ext_kv * ext, llama_io_write_i & io) {
    if (ext && !ext->paged) {
        io.write(&kv_marker, sizeof(kv_marker));
    }
}

void ggml_ext_kv_read_state(const ggml_ext_kv * ext, llama_io_read_i & io) {
    uint32_t first = 0;
    if (!ext || ext->paged) {
        return;
    }
    io.read(&first, sizeof(first));
    if (first != kv_marker) {
        throw std::runtime_error("ggml-ext: the state was saved by a cache without a budget; process the prompt anew");
    }
}
