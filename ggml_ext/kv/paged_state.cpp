// Saved states of a paged cache: upstream's format, so that a state goes from a cache of the same types, paged or not,
// to another. Rows of cells, layer by layer, first K then V.

#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cells.h"
#include "paged.h"

#include <algorithm>
#include <numeric>

size_t ggml_ext_kv_paged::row_size(const layer & layer, bool v) const {
    return v ? ggml_row_size(layer.type_v, layer.dv) : ggml_row_size(layer.type_k, layer.dk);
}

char * ggml_ext_kv_paged::row(const layer & layer, bool v, int32_t slot) const {
    const ggml_ext_kv_block block = ggml_ext_kv_block_of(layer.type_k, layer.dk, layer.type_v, layer.dv);
    return static_cast<char *>(blocks->data) + size_t(slot / GGML_EXT_KV_SLOTS) * block_size + (v ? block.v : block.k) +
           slot % GGML_EXT_KV_SLOTS * row_size(layer, v);
}

void ggml_ext_kv_paged::write(llama_io_write_i & io, uint32_t stream,
                              const std::vector<std::pair<uint32_t, uint32_t>> & ranges) const {
    std::vector<int32_t> index(n_cells, -1);  // of a cell among those that are written
    int32_t              count = 0;
    for (const auto & [begin, end] : ranges) {
        for (uint32_t cell = begin; cell < end; ++cell) {
            index[cell] = count++;
        }
    }
    const uint32_t v_trans = 0, n_layer = n_layers();
    io.write(&v_trans, sizeof(v_trans));
    io.write(&n_layer, sizeof(n_layer));
    const llama_seq_id first = n_stream > 1 ? llama_seq_id(stream) : 0;
    const llama_seq_id last  = n_stream > 1 ? first : LLAMA_MAX_SEQ - 1;
    for (const bool v : { false, true }) {
        for (const layer & layer : layers) {
            const size_t      size = row_size(layer, v);
            const int32_t     type = v ? layer.type_v : layer.type_k;
            const uint64_t    all  = size * size_t(layer.n_head_kv);
            std::vector<char> rows(all * size_t(count));
            for (llama_seq_id lane = first; lane <= last; ++lane) {
                for (int32_t head = 0; head < layer.n_head_kv; ++head) {
                    for (const ggml_ext_kv_entry & entry : held.list(uint32_t(lane), layer.first_list + head)) {
                        for (int32_t i = entry.begin; i < entry.begin + entry.count; ++i) {
                            const int32_t to = index[cell_of[lane][held.positions(entry.block)[i]]];
                            if (to >= 0) {
                                std::copy_n(row(layer, v, entry.block * GGML_EXT_KV_SLOTS + i), size,
                                            rows.data() + to * all + head * size);
                            }
                        }
                    }
                }
            }
            io.write(&type, sizeof(type));
            io.write(&all, sizeof(all));
            io.write(rows.data(), rows.size());
        }
    }
}

// Fresh blocks for cells, in the order of their first sequences' positions, and runs of them for each sequence. slots:
// of each cell, per list.
bool ggml_ext_kv_paged::lay_out(const llama_kv_cells & cells, uint32_t stream, const std::vector<uint32_t> & restored,
                                std::vector<int32_t> & slots) {
    const llama_seq_id first = n_stream > 1 ? llama_seq_id(stream) : 0;
    const llama_seq_id last  = n_stream > 1 ? first : LLAMA_MAX_SEQ - 1;
    const uint32_t     n     = uint32_t(restored.size());
    for (uint32_t cell : restored) {
        if (cells.pos_get(cell) >= GGML_EXT_KV_POSITIONS) {
            LLAMA_LOG_ERROR("%s: ggml-ext: the state has position %d, a paged KV cache takes positions below %d\n",
                            __func__, cells.pos_get(cell), GGML_EXT_KV_POSITIONS);
            return false;
        }
    }
    const uint32_t need = (n + GGML_EXT_KV_SLOTS - 1) / GGML_EXT_KV_SLOTS;
    if (uint64_t(need) * lists > held.n_free()) {
        LLAMA_LOG_ERROR("%s: ggml-ext: %u of the pool's blocks are free, the state takes %llu\n", __func__,
                        held.n_free(), (unsigned long long) need * lists);
        return false;
    }
    std::vector<llama_seq_id> owner(n);
    for (uint32_t i = 0; i < n; ++i) {
        for (owner[i] = first; owner[i] < last && !cells.seq_has(restored[i], owner[i]); ++owner[i]) {
        }
    }
    std::vector<uint32_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) {
        return std::make_pair(owner[a], cells.pos_get(restored[a])) <
               std::make_pair(owner[b], cells.pos_get(restored[b]));
    });
    slots.resize(size_t(n) * lists);
    for (uint32_t list = 0; list < lists; ++list) {
        int32_t block = -1;
        for (uint32_t i = 0; i < n; ++i) {
            block                                  = i % GGML_EXT_KV_SLOTS == 0 ? held.take_block() : block;
            const int32_t slot                     = int32_t(i % GGML_EXT_KV_SLOTS);
            slots[size_t(order[i]) * lists + list] = block * GGML_EXT_KV_SLOTS + slot;
            held.positions(block)[slot]            = cells.pos_get(restored[order[i]]);
        }
    }
    std::sort(order.begin(), order.end(),
              [&](uint32_t a, uint32_t b) { return cells.pos_get(restored[a]) < cells.pos_get(restored[b]); });
    for (uint32_t i : order) {
        const uint32_t  cell     = restored[i];
        const llama_pos position = cells.pos_get(cell);
        for (llama_seq_id lane = owner[i]; lane <= last; ++lane) {
            if (!cells.seq_has(cell, lane)) {
                continue;
            }
            for (uint32_t list = 0; list < lists; ++list) {
                const int32_t slot = slots[size_t(i) * lists + list];
                held.show(uint32_t(lane), list, slot / GGML_EXT_KV_SLOTS, uint32_t(slot % GGML_EXT_KV_SLOTS));
            }
            cell_of[lane].resize(std::max(cell_of[lane].size(), size_t(position) + 1), -1);
            cell_of[lane][position] = int32_t(cell);
        }
    }
    return true;
}

bool ggml_ext_kv_paged::read(llama_io_read_i & io, const llama_kv_cells & cells, uint32_t stream,
                             const std::vector<uint32_t> & restored) {
    uint32_t v_trans = 0, n_layer = 0;
    io.read(&v_trans, sizeof(v_trans));
    io.read(&n_layer, sizeof(n_layer));
    std::vector<int32_t> slots;
    if (v_trans != 0 || n_layer != n_layers()) {
        LLAMA_LOG_ERROR("%s: ggml-ext: the state has %u layers%s, the cache %u\n", __func__, n_layer,
                        v_trans ? " and V transposed (-fa off)" : "", n_layers());
        return false;
    }
    if (!lay_out(cells, stream, restored, slots)) {
        return false;
    }
    for (const bool v : { false, true }) {
        for (const layer & layer : layers) {
            const size_t   size = row_size(layer, v);
            const uint64_t all  = size * size_t(layer.n_head_kv);
            int32_t        type = 0;
            uint64_t       have = 0;
            io.read(&type, sizeof(type));
            io.read(&have, sizeof(have));
            if (type != (v ? layer.type_v : layer.type_k) || have != all) {
                LLAMA_LOG_ERROR("%s: ggml-ext: the state's rows of %s are %s of %llu bytes\n", __func__, v ? "V" : "K",
                                type >= 0 && type < GGML_TYPE_COUNT ? ggml_type_name(ggml_type(type)) : "unknown",
                                (unsigned long long) have);
                return false;
            }
            std::vector<char> rows(all * restored.size());
            io.read(rows.data(), rows.size());
            for (size_t i = 0; i < restored.size(); ++i) {
                for (int32_t head = 0; head < layer.n_head_kv; ++head) {
                    std::copy_n(rows.data() + i * all + head * size, size,
                                row(layer, v, slots[i * lists + layer.first_list + head]));
                }
            }
        }
    }
    return true;
}
