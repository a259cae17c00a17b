// A paged cache's blocks in the course of a context: batches, sequence operations, a graph's inputs.

#include "paged.h"

#include "ggml-backend.h"
#include "llama-batch.h"
#include "llama-cparams.h"
#include "llama-impl.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

ggml_ext_kv_paged::ggml_ext_kv_paged(uint32_t n_cells, uint32_t n_stream, const ggml_ext_kv_setting & rule,
                                     uint32_t n_seq, int n_threads) :
    n_cells(n_cells), n_stream(n_stream), rule(rule), n_seq(n_seq), held(0, 0, 0), prefixes(LLAMA_MAX_SEQ),
    cell_of(LLAMA_MAX_SEQ), boundary(LLAMA_MAX_SEQ, -1) {
    if (rule.cold > 0) {
        codes = std::make_unique<ggml_ext_kv_cold_pool>(rule.cold, scored(), n_threads);
    }
}

void ggml_ext_kv_paged::add(layer layer, const ggml_tensor * k, const ggml_tensor * v, ggml_tensor * books) {
    layer.index      = n_layers();
    layer.first_list = lists;
    names[k]         = uint32_t(layers.size());
    names[v]         = uint32_t(layers.size());
    block_size       = std::max(block_size, block_of(layer).size);
    lists += uint32_t(layer.n_head_kv);
    layer_of.resize(lists, uint32_t(layers.size()));
    layers.push_back(layer);
    if (codes) {
        codes->add(layer.dk, layer.dv, layer.n_head_kv, books);
    }
}

void ggml_ext_kv_paged::allocate(uint64_t blocks_per_list, uint64_t cold_blocks_per_list, bool alloc) {
    held = rows.allocate("cache_blocks", block_size, lists, blocks_per_list * lists, alloc);
    if (codes) {
        codes->allocate(cold_blocks_per_list * lists, alloc);
    }
}

const ggml_ext_kv_paged::layer * ggml_ext_kv_paged::find(const ggml_tensor * name) const {
    while (name->view_src) {
        name = name->view_src;
    }
    const auto found = names.find(name);
    return found == names.end() ? nullptr : &layers[found->second];
}

// Whether each sequence's positions rise and are small enough for tables by position.
static bool kv_positions_fit(const std::vector<llama_ubatch> & ubatches) {
    std::vector<llama_pos> last(LLAMA_MAX_SEQ, -1);
    for (const llama_ubatch & ubatch : ubatches) {
        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            for (int32_t j = 0; j < ubatch.n_seq_id[i]; ++j) {
                const llama_seq_id s = ubatch.seq_id[i][j];
                if (ubatch.pos[i] <= last[s] || ubatch.pos[i] >= GGML_EXT_KV_POSITIONS) {
                    LLAMA_LOG_ERROR(
                        "%s: ggml-ext: position %d of sequence %d: in a paged KV cache positions rise and are "
                        "below %d\n",
                        __func__, ubatch.pos[i], s, GGML_EXT_KV_POSITIONS);
                    return false;
                }
                last[s] = ubatch.pos[i];
            }
        }
    }
    return true;
}

// Without tokens of several sequences a bound suffices; else, and where the bound is too high, a copy is asked.
bool ggml_ext_kv_paged::fits(const std::vector<llama_ubatch> & ubatches) {
    merge();
    if (!kv_positions_fit(ubatches)) {
        return false;
    }
    if (evicts() || codes) {
        return can_fit(ubatches) && has_cold_room(ubatches);
    }
    std::vector<uint32_t> n(LLAMA_MAX_SEQ);
    bool                  coupled = false;
    for (const llama_ubatch & ubatch : ubatches) {
        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            coupled |= ubatch.n_seq_id[i] > 1;
            n[ubatch.seq_id[i][0]]++;
        }
    }
    uint64_t needed = 0;
    for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ; ++s) {
        needed += n[s] > 0 ? held.n_needed(s, n[s]) : 0;
    }
    if (!coupled && needed <= held.n_free()) {
        return true;
    }
    ggml_ext_kv_pages copy = held;
    copy.keep_positions(nullptr, 0);
    std::vector<int32_t> unused(lists);
    for (const llama_ubatch & ubatch : ubatches) {
        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            if (!copy.append(ubatch.seq_id[i], ubatch.n_seq_id[i], ubatch.pos[i], unused.data())) {
                return false;
            }
        }
    }
    return true;
}

// The blocks that the last ubatch has filled, once it is computed.
void ggml_ext_kv_paged::merge() {
    if (computed && kind > 0 && !codes) {
        for (const token & token : tokens) {
            prefixes.add(uint32_t(token.lane), token.position, token.id, kind);
        }
        for (const llama_seq_id lane : lanes) {
            prefixes.merge(uint32_t(lane), held);
        }
    }
    tokens.clear();
    computed = false;
}

uint32_t ggml_ext_kv_paged::number_of(const std::vector<uint64_t> & kind) {
    return kind.empty() ? 0 : kinds.emplace(kind, uint32_t(kinds.size()) + 1).first->second;
}

void ggml_ext_kv_paged::end(uint32_t kind) {
    begun      = false;
    computed   = true;
    this->kind = kind;
}

void ggml_ext_kv_paged::begin(const llama_ubatch & ubatch, const std::vector<uint32_t> & token_cells) {
    merge();
    if ((evicts() || codes) && most_blocks(ubatch, true) > held.n_free() && !make_room(ubatch)) {
        GGML_ABORT("ggml-ext: a paged KV cache took a batch that it cannot make room for");
    }
    begun = true;
    slots.resize(size_t(ubatch.n_tokens) * lists);
    lane_of.resize(ubatch.n_tokens);
    lanes.clear();
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const llama_seq_id * seen = ubatch.seq_id[i];
        const bool done = held.append(seen, ubatch.n_seq_id[i], ubatch.pos[i], slots.data() + size_t(i) * lists);
        GGML_ASSERT(done && "ggml-ext: a paged KV cache took a batch that it has no blocks for");
        for (int32_t j = 0; j < ubatch.n_seq_id[i]; ++j) {
            std::vector<int32_t> & cells = cell_of[seen[j]];
            cells.resize(std::max(cells.size(), size_t(ubatch.pos[i]) + 1), -1);
            cells[ubatch.pos[i]] = int32_t(token_cells[i]);
            if (ubatch.token) {
                tokens.push_back({ i, seen[j], ubatch.pos[i], ubatch.token[i] });
            }
        }
        // The first sequence's, as in upstream's mask.
        const auto lane = std::find(lanes.begin(), lanes.end(), seen[0]);
        lane_of[i]      = uint32_t(lane - lanes.begin());
        if (lane == lanes.end()) {
            lanes.push_back(seen[0]);
        }
    }
}

// What is gone of [position] has no cell, and the last that is there has one.
static void kv_forget_cells(std::vector<int32_t> & cells, llama_pos p0, llama_pos p1) {
    const size_t begin = std::min(cells.size(), size_t(std::max(p0, 0)));
    const size_t end   = std::min(cells.size(), size_t(std::max(p1, 0)));
    std::fill(cells.begin() + begin, cells.begin() + std::max(begin, end), -1);
    while (!cells.empty() && cells.back() < 0) {
        cells.pop_back();
    }
}

// Nothing is merged yet: upstream removes a ubatch whose graph failed or was aborted, so what is taken out of the last
// one counts as never computed, in each of its token's sequences.
void ggml_ext_kv_paged::remove(llama_seq_id s, llama_pos p0, llama_pos p1) {
    std::vector<bool> gone(lane_of.size());
    for (const token & token : tokens) {
        if ((s < 0 || token.lane == s) && token.position >= p0 && token.position < p1) {
            gone[token.index] = true;
        }
    }
    tokens.erase(std::remove_if(tokens.begin(), tokens.end(), [&](const token & token) { return gone[token.index]; }),
                 tokens.end());
    for (llama_seq_id lane = std::max(s, 0); lane < (s < 0 ? LLAMA_MAX_SEQ : s + 1); ++lane) {
        held.remove(uint32_t(lane), p0, p1);
        if (codes) {
            codes->pages.remove(uint32_t(lane), p0, p1);
        }
        prefixes.cut(uint32_t(lane), p0);
        kv_forget_cells(cell_of[lane], p0, p1);
        if (p0 <= boundary[lane] && p1 > boundary[lane]) {
            boundary[lane] = -1;
        }
    }
}

bool ggml_ext_kv_paged::removable(llama_seq_id s, llama_pos p0, llama_pos p1) const {
    for (llama_seq_id lane = std::max(s, 0); lane < (s < 0 ? LLAMA_MAX_SEQ : s + 1); ++lane) {
        const bool whole = p0 <= 0 && p1 >= llama_pos(cell_of[lane].size());
        if (boundary[lane] >= 0 && p0 <= boundary[lane] && !whole) {
            return false;
        }
    }
    return true;
}

// Both pools' or neither's. A position that one sequence has as a row and the other as a code is of two tokens.
bool ggml_ext_kv_paged::share_pages(uint32_t from, uint32_t to, llama_pos p0, llama_pos p1) {
    if (!codes) {
        return held.share(from, to, p0, p1);
    }
    for (uint32_t list = 0; list < lists; ++list) {
        if (held.meets(from, codes->pages, to, list, p0, p1) || codes->pages.meets(from, held, to, list, p0, p1)) {
            return false;
        }
    }
    const ggml_ext_kv_pages before = held;
    if (held.share(from, to, p0, p1) && codes->pages.share(from, to, p0, p1)) {
        return true;
    }
    held = before;
    return false;
}

void ggml_ext_kv_paged::share(llama_seq_id from, llama_seq_id to, llama_pos p0, llama_pos p1) {
    if (from == to) {
        return;
    }
    merge();
    p0 = std::max(p0, 0);
    p1 = p1 < 0 ? INT32_MAX : p1;
    if (n_stream > 1) {  // upstream copies the stream
        held.clear(uint32_t(to));
        if (codes) {
            codes->pages.clear(uint32_t(to));
        }
        prefixes.cut(uint32_t(to), 0);
        cell_of[to].clear();
        boundary[to] = -1;
        p0           = 0;
        p1           = INT32_MAX;
    }
    if (!share_pages(uint32_t(from), uint32_t(to), p0, p1)) {
        LLAMA_LOG_ERROR("%s: ggml-ext: a paged KV cache cannot copy positions %d .. of sequence %d into sequence %d, "
                        "which has others there and keeps them; remove them first\n",
                        __func__, p0, from, to);
        return;
    }
    prefixes.copy(uint32_t(from), uint32_t(to), p0, p1);
    if (p0 <= boundary[from] && p1 > llama_pos(rule.sink)) {
        boundary[to] = std::max(boundary[to], std::min(boundary[from], p1 - 1));
    }
    std::vector<int32_t> &       cells = cell_of[to];
    const std::vector<int32_t> & other = cell_of[from];
    cells.resize(std::max(cells.size(), std::min(other.size(), size_t(p1))), -1);
    for (size_t p = size_t(p0); p < std::min(other.size(), size_t(p1)); ++p) {
        cells[p] = other[p];
    }
}

void ggml_ext_kv_paged::keep(llama_seq_id s) {
    for (llama_seq_id lane = 0; lane < LLAMA_MAX_SEQ && n_stream == 1; ++lane) {
        if (lane != s) {
            remove(lane, 0, INT32_MAX);
        }
    }
}

void ggml_ext_kv_paged::clear() {
    remove(-1, 0, INT32_MAX);
}

uint32_t ggml_ext_kv_paged::n_entries() const {
    if (!begun) {
        return n_cells / GGML_EXT_KV_SLOTS + 1;
    }
    size_t most = 1;
    for (llama_seq_id lane : lanes) {
        for (uint32_t i = 0; i < lists; ++i) {
            most = std::max(
                most, held.list(uint32_t(lane), i).size() + (codes ? codes->pages.list(uint32_t(lane), i).size() : 0));
        }
    }
    return uint32_t(most);
}

uint32_t ggml_ext_kv_paged::n_positions() const {
    if (!begun) {
        return n_cells;
    }
    size_t most = 1;
    for (llama_seq_id lane : lanes) {
        most = std::max(most, cell_of[lane].size());
    }
    return uint32_t(most);
}

void ggml_ext_kv_paged::fill_slots(int32_t * to) const {
    std::copy(slots.begin(), slots.end(), to);
}

void ggml_ext_kv_paged::fill_table(int32_t * to, uint32_t n_lanes) const {
    auto *  entries = reinterpret_cast<ggml_ext_kv_entry *>(to + size_t(n_lanes) * lists + 1);
    int32_t n       = 0;
    for (uint32_t lane = 0; lane < n_lanes; ++lane) {
        for (uint32_t i = 0; i < lists; ++i) {
            *to++ = n;
            if (lane < lanes.size()) {
                if (codes) {
                    for (ggml_ext_kv_entry entry : codes->pages.list(uint32_t(lanes[lane]), i)) {
                        entry.block += int32_t(held.n_blocks());
                        entries[n++] = entry;
                    }
                }
                const std::vector<ggml_ext_kv_entry> & list = held.list(uint32_t(lanes[lane]), i);
                std::copy(list.begin(), list.end(), entries + n);
                n += int32_t(list.size());
            }
        }
    }
    *to = n;
}

void ggml_ext_kv_paged::fill_cells(int32_t * to, uint32_t n_lanes, uint32_t n_positions) const {
    std::fill_n(to, size_t(n_lanes) * n_positions, -1);
    for (size_t lane = 0; lane < lanes.size(); ++lane) {
        const std::vector<int32_t> & cells = cell_of[lanes[lane]];
        std::copy(cells.begin(), cells.end(), to + lane * n_positions);
    }
}

void ggml_ext_kv_paged::fill_order(int32_t * to, uint32_t n_lanes) const {
    int32_t * tokens = to + n_lanes + 1;
    int32_t   n      = 0;
    for (uint32_t lane = 0; lane < n_lanes; ++lane) {
        to[lane] = n;
        for (size_t i = 0; i < lane_of.size(); ++i) {
            if (lane_of[i] == lane) {
                tokens[n++] = int32_t(i);
            }
        }
    }
    to[n_lanes] = n;
}
