// Decisions of attention_prefill that are made on the host: windows and chunks of the cache, places in the workspace.

#pragma once

#include "common/tuning.h"
#include "prefill.h"

#include <algorithm>

namespace ggml_ext {

inline int64_t attention_ceil(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// Chunks of a window that keep n_slots blocks of threads busy. The last round of blocks costs as much as a full one,
// so the time is about rounds * (tiles of a chunk + what a block costs beside them).
// part_bytes: what a chunk's partial results take.
inline int attention_chunks(int64_t n_blocks, int n_tiles, int n_slots, int64_t part_bytes) {
    const int fit        = (int) std::min<int64_t>(attention_max_chunks, attention_max_bytes / part_bytes);
    const int max_chunks = std::max(1, std::min(fit, n_tiles / 8));
    int       best       = 1;
    int64_t   best_cost  = INT64_MAX;
    for (int n = 1; n <= max_chunks; n++) {
        const int64_t cost =
            attention_ceil(n_blocks * n, n_slots) * (attention_ceil(n_tiles, n) + (n > 1 ? attention_chunk_tiles : 0));
        if (cost < best_cost) {
            best      = n;
            best_cost = cost;
        }
    }
    return best;
}

// Tiles of a window: at least 8, as few windows as there can be, all of about the same length.
inline int attention_window_tiles(const attention_prefill & p) {
    const int64_t tile_bytes = (int64_t) p.n_heads * attention_tile / p.layout.tokens * p.layout.bytes;
    const int64_t most = std::min<int64_t>(attention_window, std::max<int64_t>(8, attention_max_bytes / tile_bytes));
    return (int) attention_ceil(p.n_tiles, attention_ceil(p.n_tiles, most));
}

// Fills in what follows from the problem. n_slots: blocks of threads that the device runs at once.
inline void attention_plan(attention_prefill & p, int n_slots) {
    p.smooth      = p.smooth && p.k.type == ATTENTION_F16;
    p.groups      = p.k.type == ATTENTION_F16 ? 1 : p.d / 32;
    p.layout      = attention_step(p.d, p.groups, p.full);
    p.n_heads     = p.heads_kv * p.n_streams;
    p.n_rows      = p.n_q * p.gqa;
    p.n_blocks    = (int) attention_ceil(p.n_rows, attention_block_rows);
    p.n_tiles     = (int) attention_ceil(p.n_kv, attention_tile);
    p.padded_rows = (int64_t) p.n_blocks * attention_block_rows;
    p.window      = attention_window_tiles(p);
    p.n_windows   = (int) attention_ceil(p.n_tiles, p.window);
    p.chunk       = (int) attention_ceil(p.window, attention_chunks((int64_t) p.n_blocks * p.n_heads, p.window, n_slots,
                                                                    p.n_heads * p.padded_rows * (p.d + 2) * 4));
    p.n_chunks    = (int) attention_ceil(p.window, p.chunk);
}

// Bytes of workspace; with a base, which is 256-byte aligned, also points into it.
inline size_t attention_place(attention_prefill & p, char * base) {
    size_t     size  = 0;
    const auto place = [&](auto *& to, int64_t bytes) {
        to = base && bytes ? reinterpret_cast<std::remove_reference_t<decltype(to)>>(base + size) : nullptr;
        size += (size_t) attention_ceil(bytes, 256) * 256;
    };
    const int64_t rows  = p.n_heads * p.padded_rows;
    const int64_t parts = p.parts();
    place(p.q_codes, rows * p.d);
    place(p.q_rows, rows * (int64_t) sizeof(attention_row));
    place(p.k_mean, p.smooth ? (int64_t) p.n_heads * p.d * 4 : 0);
    place(p.k_sums, p.smooth ? (int64_t) p.n_heads * p.n_tiles * p.d * 4 : 0);
    place(p.steps, (int64_t) p.n_heads * p.window * (attention_tile / p.layout.tokens) * p.layout.bytes);
    place(p.visible, p.mask.data ? p.n_mask_streams * p.n_blocks * p.n_tiles : 0);
    place(p.partial, parts * rows * p.d * 4);
    place(p.partial_meta, parts * rows * 2 * 4);
    return size;
}

}  // namespace ggml_ext
