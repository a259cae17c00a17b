// Saved states of a paged cache. Where nothing is evicted: upstream's format, so that a state goes from a cache of the
// same types, paged or not, to another: rows of cells, layer by layer, first K then V. Where slots may be missing, which
// any other cache would take for a whole prompt, a format of our own: u32 marker, policy, n_layer; per list u32 n, u32
// cell [n], rising; then for K and V, layer by layer, i32 type, u64 bytes of a head's row, and each head's n rows; then,
// where there are scores, each list's n.

#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cells.h"
#include "paged.h"

#include <algorithm>
#include <functional>
#include <numeric>

// Stands where upstream says whether V is transposed: it refuses such a state.
static constexpr uint32_t kv_rows_marker = 0x45584747;  // "GGXE"

template <class T> static void kv_put(llama_io_write_i & io, T value) {
    io.write(&value, sizeof(value));
}

template <class T> static T kv_get(llama_io_read_i & io) {
    T value;
    io.read(&value, sizeof(value));
    return value;
}

size_t ggml_ext_kv_paged::row_size(const layer & layer, bool v) const {
    return v ? ggml_row_size(layer.type_v, layer.dv) : ggml_row_size(layer.type_k, layer.dk);
}

char * ggml_ext_kv_paged::row(const layer & layer, bool v, int32_t slot) const {
    const ggml_ext_kv_block block = block_of(layer);
    return static_cast<char *>(blocks->data) + size_t(slot / GGML_EXT_KV_SLOTS) * block_size + (v ? block.v : block.k) +
           slot % GGML_EXT_KV_SLOTS * row_size(layer, v);
}

std::pair<uint32_t, uint32_t> ggml_ext_kv_paged::lanes_of(uint32_t stream) const {
    return n_stream > 1 ? std::make_pair(stream, stream + 1) : std::make_pair(0u, uint32_t(LLAMA_MAX_SEQ));
}

// The slots of a list that hold cells of a stream, by the cells' index among those that are written; -1: none.
std::vector<int32_t> ggml_ext_kv_paged::slots_of(uint32_t list, uint32_t stream, const std::vector<int32_t> & index,
                                                 size_t count) const {
    std::vector<int32_t> slots(count, -1);
    const auto [first, last] = lanes_of(stream);
    for (uint32_t lane = first; lane < last; ++lane) {
        for (const ggml_ext_kv_entry & entry : held.list(lane, list)) {
            for (int32_t i = entry.begin; i < entry.begin + entry.count; ++i) {
                const int32_t to = index[cell_of[lane][held.positions(entry.block)[i]]];
                if (to >= 0) {
                    slots[to] = entry.block * GGML_EXT_KV_SLOTS + i;
                }
            }
        }
    }
    return slots;
}

void ggml_ext_kv_paged::write(llama_io_write_i & io, uint32_t stream,
                              const std::vector<std::pair<uint32_t, uint32_t>> & ranges) const {
    std::vector<int32_t> index(n_cells, -1);
    size_t               count = 0;
    for (const auto & [begin, end] : ranges) {
        for (uint32_t cell = begin; cell < end; ++cell) {
            index[cell] = int32_t(count++);
        }
    }
    std::vector<std::vector<int32_t>> slots;
    for (uint32_t list = 0; list < lists; ++list) {
        slots.push_back(slots_of(list, stream, index, count));
    }
    if (evicts()) {
        write_present(io, slots);
        return;
    }
    kv_put(io, uint32_t(0));  // V is not transposed
    kv_put(io, n_layers());
    for (const bool v : { false, true }) {
        for (const layer & layer : layers) {
            const size_t      size = row_size(layer, v);
            const uint64_t    all  = size * size_t(layer.n_head_kv);
            std::vector<char> rows(all * count);
            for (int32_t head = 0; head < layer.n_head_kv; ++head) {
                const std::vector<int32_t> & from = slots[layer.first_list + head];
                for (size_t i = 0; i < count; ++i) {
                    if (from[i] >= 0) {
                        std::copy_n(row(layer, v, from[i]), size, rows.data() + i * all + head * size);
                    }
                }
            }
            kv_put(io, int32_t(v ? layer.type_v : layer.type_k));
            kv_put(io, all);
            io.write(rows.data(), rows.size());
        }
    }
}

void ggml_ext_kv_paged::write_present(llama_io_write_i & io, std::vector<std::vector<int32_t>> & slots) const {
    kv_put(io, kv_rows_marker);
    kv_put(io, uint32_t(rule.policy));
    kv_put(io, n_layers());
    for (std::vector<int32_t> & list : slots) {
        std::vector<uint32_t> present;
        for (uint32_t i = 0; i < list.size(); ++i) {
            if (list[i] >= 0) {
                present.push_back(i);
            }
        }
        list.erase(std::remove(list.begin(), list.end(), -1), list.end());
        kv_put(io, uint32_t(present.size()));
        io.write(present.data(), present.size() * sizeof(uint32_t));
    }
    for (const bool v : { false, true }) {
        for (const layer & layer : layers) {
            kv_put(io, int32_t(v ? layer.type_v : layer.type_k));
            kv_put(io, uint64_t(row_size(layer, v)));
            for (int32_t head = 0; head < layer.n_head_kv; ++head) {
                for (int32_t slot : slots[layer.first_list + head]) {
                    io.write(row(layer, v, slot), row_size(layer, v));
                }
            }
        }
    }
    for (uint32_t list = 0; list < lists && scored(); ++list) {
        for (int32_t slot : slots[list]) {
            io.write(score(layers[layer_of[list]], slot), sizeof(float));
        }
    }
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
std::vector<std::vector<int32_t>> ggml_ext_kv_paged::lay_out(const llama_kv_cells & cells, uint32_t stream,
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
    if (need > held.n_free() && !(evicts() && make_room(need))) {
        LLAMA_LOG_ERROR("%s: ggml-ext: %u of the pool's blocks are free, the state takes %llu\n", __func__,
                        held.n_free(), (unsigned long long) need);
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
            const int32_t at          = int32_t(i % GGML_EXT_KV_SLOTS);
            block                     = at == 0 ? held.take_block() : block;
            slot[order[i]]            = block * GGML_EXT_KV_SLOTS + at;
            held.positions(block)[at] = position(order[i]);
        }
        std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return position(a) < position(b); });
        for (uint32_t i : order) {
            for (uint32_t lane = owner[i]; lane < last; ++lane) {
                if (cells.seq_has(restored[i], llama_seq_id(lane))) {
                    held.show(lane, list, slot[i] / GGML_EXT_KV_SLOTS, uint32_t(slot[i] % GGML_EXT_KV_SLOTS));
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

// Whether the state's rows, of `size` bytes, are the layer's.
static bool kv_rows_are(llama_io_read_i & io, ggml_type type, uint64_t size, bool v) {
    const int32_t  have_type = kv_get<int32_t>(io);
    const uint64_t have      = kv_get<uint64_t>(io);
    if (have_type == type && have == size) {
        return true;
    }
    LLAMA_LOG_ERROR("%s: ggml-ext: the state's rows of %s are %s of %llu bytes\n", __func__, v ? "V" : "K",
                    have_type >= 0 && have_type < GGML_TYPE_COUNT ? ggml_type_name(ggml_type(have_type)) : "unknown",
                    (unsigned long long) have);
    return false;
}

bool ggml_ext_kv_paged::read(llama_io_read_i & io, const llama_kv_cells & cells, uint32_t stream,
                             const std::vector<uint32_t> & restored) {
    if (evicts()) {
        return read_present(io, cells, stream, restored);
    }
    const uint32_t v_trans = kv_get<uint32_t>(io), n_layer = kv_get<uint32_t>(io);
    if (v_trans == kv_rows_marker) {
        LLAMA_LOG_ERROR("%s: ggml-ext: the state was saved by a cache that evicts; process the prompt anew\n",
                        __func__);
        return false;
    }
    if (v_trans != 0 || n_layer != n_layers()) {
        LLAMA_LOG_ERROR("%s: ggml-ext: the state has %u layers%s, the cache %u\n", __func__, n_layer,
                        v_trans ? " and V transposed (-fa off)" : "", n_layers());
        return false;
    }
    std::vector<uint32_t> all_cells(restored.size());
    std::iota(all_cells.begin(), all_cells.end(), 0);
    const auto slots = lay_out(cells, stream, restored, std::vector<std::vector<uint32_t>>(lists, all_cells));
    if (slots.empty()) {
        return false;
    }
    for (const bool v : { false, true }) {
        for (const layer & layer : layers) {
            const size_t   size = row_size(layer, v);
            const uint64_t all  = size * size_t(layer.n_head_kv);
            if (!kv_rows_are(io, v ? layer.type_v : layer.type_k, all, v)) {
                return false;
            }
            std::vector<char> rows(all * restored.size());
            io.read(rows.data(), rows.size());
            for (int32_t head = 0; head < layer.n_head_kv; ++head) {
                for (size_t i = 0; i < restored.size(); ++i) {
                    std::copy_n(rows.data() + i * all + head * size, size,
                                row(layer, v, slots[layer.first_list + head][i]));
                }
            }
        }
    }
    return true;
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

bool ggml_ext_kv_paged::read_present(llama_io_read_i & io, const llama_kv_cells & cells, uint32_t stream,
                                     const std::vector<uint32_t> & restored) {
    if (kv_get<uint32_t>(io) != kv_rows_marker || kv_get<uint32_t>(io) != uint32_t(rule.policy)) {
        LLAMA_LOG_ERROR("%s: ggml-ext: the state was saved by a cache of another policy; process the prompt anew\n",
                        __func__);
        return false;
    }
    const uint32_t n_layer = kv_get<uint32_t>(io);
    if (n_layer != n_layers()) {
        LLAMA_LOG_ERROR("%s: ggml-ext: the state has %u layers, the cache %u\n", __func__, n_layer, n_layers());
        return false;
    }
    std::vector<std::vector<uint32_t>> present(lists);
    for (std::vector<uint32_t> & list : present) {
        const uint32_t n = kv_get<uint32_t>(io);
        list.resize(std::min(n, uint32_t(restored.size())));
        io.read(list.data(), list.size() * sizeof(uint32_t));
        if (n != list.size() || (n > 0 && list.back() >= restored.size()) ||
            std::adjacent_find(list.begin(), list.end(), std::greater_equal<uint32_t>()) != list.end()) {
            LLAMA_LOG_ERROR("%s: ggml-ext: the state's lists do not fit its %zu cells\n", __func__, restored.size());
            return false;
        }
    }
    const auto slots = lay_out(cells, stream, restored, present);
    if (slots.empty()) {
        return false;
    }
    for (const bool v : { false, true }) {
        for (const layer & layer : layers) {
            if (!kv_rows_are(io, v ? layer.type_v : layer.type_k, row_size(layer, v), v)) {
                return false;
            }
            for (int32_t head = 0; head < layer.n_head_kv; ++head) {
                for (int32_t slot : slots[layer.first_list + head]) {
                    io.read(row(layer, v, slot), row_size(layer, v));
                }
            }
        }
    }
    for (uint32_t list = 0; list < lists && scored(); ++list) {
        for (int32_t slot : slots[list]) {
            io.read(score(layers[layer_of[list]], slot), sizeof(float));
        }
    }
    if (attended()) {
        find_boundaries(cells, stream, restored, present);
    }
    return true;
}
