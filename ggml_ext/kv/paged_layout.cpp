// Where the tokens of a saved state are, and where they come to be, in the blocks of a paged cache.

#include "llama-impl.h"
#include "llama-kv-cells.h"
#include "paged.h"

#include <algorithm>

std::pair<uint32_t, uint32_t> ggml_ext_kv_paged::lanes_of(uint32_t stream) const {
    return n_stream > 1 ? std::make_pair(stream, stream + 1) : std::make_pair(0u, uint32_t(LLAMA_MAX_SEQ));
}

// The slots of a list of rows, or of codes, that hold cells of a stream, by the cells' index among those that are written; -1: none.
std::vector<int32_t> ggml_ext_kv_paged::slots_of(bool cold, uint32_t list, uint32_t stream,
                                                 const std::vector<int32_t> & index, size_t count) const {
    std::vector<int32_t> slots(count, -1);
    const auto [first, last]        = lanes_of(stream);
    const ggml_ext_kv_pages & pages = pages_of(cold);
    for (uint32_t lane = first; lane < last; ++lane) {
        for (const ggml_ext_kv_entry & entry : pages.list(lane, list)) {
            for (int32_t i = entry.begin; i < entry.begin + entry.count; ++i) {
                const int32_t to = index[cell_of[lane][pages.positions(entry.block)[i]]];
                if (to >= 0) {
                    slots[to] = entry.block * GGML_EXT_KV_SLOTS + i;
                }
            }
        }
    }
    return slots;
}

// Whether cells of a state, of sequences first .. last - 1, are what a batch could have made of an empty cache.
static bool kv_cells_fit(const llama_kv_cells & cells, const std::vector<uint32_t> & restored, uint32_t first,
                         uint32_t last) {
    std::vector<std::vector<llama_pos>> positions(last - first);
    for (uint32_t cell : restored) {
        const llama_pos position = cells.pos_get(cell);
        if (position < 0 || position >= GGML_EXT_KV_POSITIONS) {
            LLAMA_LOG_ERROR("%s: ggml-ext: the state has position %d, a paged KV cache takes 0 to %d\n", __func__,
                            position, GGML_EXT_KV_POSITIONS - 1);
            return false;
        }
        bool held = false;
        for (uint32_t lane = first; lane < last; ++lane) {
            if (cells.seq_has(cell, llama_seq_id(lane))) {
                positions[lane - first].push_back(position);
                held = true;
            }
        }
        if (!held) {
            LLAMA_LOG_ERROR("%s: ggml-ext: the state has position %d of no sequence\n", __func__, position);
            return false;
        }
    }
    for (std::vector<llama_pos> & lane : positions) {
        std::sort(lane.begin(), lane.end());
        const auto twice = std::adjacent_find(lane.begin(), lane.end());
        if (twice != lane.end()) {
            LLAMA_LOG_ERROR("%s: ggml-ext: the state has position %d of a sequence twice\n", __func__, *twice);
            return false;
        }
    }
    return true;
}

// Fresh blocks for cells, in the order of their first sequences' positions, and runs of them for each sequence. present:
// of each list, which cells it has, rising. Returns their slots in that order; empty where that cannot be.
std::vector<std::vector<int32_t>> ggml_ext_kv_paged::lay_out(bool cold, const llama_kv_cells & cells, uint32_t stream,
                                                             const std::vector<uint32_t> &              restored,
                                                             const std::vector<std::vector<uint32_t>> & present) {
    const auto [first, last] = lanes_of(stream);
    const uint32_t n         = uint32_t(restored.size());
    if (!kv_cells_fit(cells, restored, first, last)) {
        return {};
    }
    uint64_t need = 0;
    for (const std::vector<uint32_t> & list : present) {
        need += (list.size() + GGML_EXT_KV_SLOTS - 1) / GGML_EXT_KV_SLOTS;
    }
    ggml_ext_kv_pages & pages = pages_of(cold);
    if (need > pages.n_free() && !(cold ? make_cold_room(need, 0) : (evicts() || codes) && make_room(need, 0))) {
        LLAMA_LOG_ERROR("%s: ggml-ext: %u of the %s blocks are free, the state takes %llu\n", __func__, pages.n_free(),
                        cold ? "codes'" : "pool's", (unsigned long long) need);
        return {};
    }
    std::vector<uint32_t> owner(n);
    for (uint32_t i = 0; i < n; ++i) {
        for (owner[i] = first; owner[i] + 1 < last && !cells.seq_has(restored[i], llama_seq_id(owner[i])); ++owner[i]) {
        }
    }
    const auto                        position = [&](uint32_t i) { return cells.pos_get(restored[i]); };
    std::vector<std::vector<int32_t>> slots;
    for (uint32_t list = 0; list < lists; ++list) {
        std::vector<int32_t>  slot(n, -1);
        std::vector<uint32_t> order = present[list];
        std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) {
            return std::make_pair(owner[a], position(a)) < std::make_pair(owner[b], position(b));
        });
        int32_t block = -1;
        for (size_t i = 0; i < order.size(); ++i) {
            const int32_t at           = int32_t(i % GGML_EXT_KV_SLOTS);
            block                      = at == 0 ? pages.take_block() : block;
            slot[order[i]]             = block * GGML_EXT_KV_SLOTS + at;
            pages.positions(block)[at] = position(order[i]);
        }
        std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return position(a) < position(b); });
        for (uint32_t i : order) {
            for (uint32_t lane = owner[i]; lane < last; ++lane) {
                if (cells.seq_has(restored[i], llama_seq_id(lane))) {
                    pages.show(lane, list, slot[i] / GGML_EXT_KV_SLOTS, uint32_t(slot[i] % GGML_EXT_KV_SLOTS));
                }
            }
        }
        slots.emplace_back();
        for (uint32_t i : present[list]) {
            slots.back().push_back(slot[i]);
        }
    }
    for (uint32_t i = 0; i < n; ++i) {
        for (uint32_t lane = owner[i]; lane < last; ++lane) {
            if (cells.seq_has(restored[i], llama_seq_id(lane))) {
                cell_of[lane].resize(std::max(cell_of[lane].size(), size_t(position(i)) + 1), -1);
                cell_of[lane][position(i)] = int32_t(restored[i]);
            }
        }
    }
    return slots;
}

void ggml_ext_kv_paged::find_boundaries(const llama_kv_cells & cells, uint32_t stream,
                                        const std::vector<uint32_t> &              restored,
                                        const std::vector<std::vector<uint32_t>> & present) {
    const auto [first, last] = lanes_of(stream);
    for (uint32_t i = 0; i < restored.size(); ++i) {
        const auto has = [&](const std::vector<uint32_t> & list) {
            return std::binary_search(list.begin(), list.end(), i);
        };
        if (std::all_of(present.begin(), present.end(), has)) {
            continue;
        }
        for (uint32_t lane = first; lane < last; ++lane) {
            if (cells.seq_has(restored[i], llama_seq_id(lane))) {
                boundary[lane] = std::max(boundary[lane], cells.pos_get(restored[i]));
            }
        }
    }
}
