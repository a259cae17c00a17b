// Saved states of a paged cache. Where nothing is evicted: upstream's format, so that a state goes from a cache of the
// same types, paged or not, to another: rows of cells, layer by layer, first K then V. Where slots may be missing, which
// any other cache would take for a whole prompt, a format of our own: u32 marker, policy, n_layer; per list u32 n, u32
// cell [n], rising; then for K and V, layer by layer, i32 type, u64 bytes of a head's row, and each head's n rows; then,
// where there are scores, each list's n. Where old tokens are codes, u32 channels of a code follow another marker, and
// lists, rows and scores come twice, first of what is coded.

#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cells.h"
#include "paged.h"

#include <algorithm>
#include <functional>
#include <numeric>

// Stands where upstream says whether V is transposed: it refuses such a state.
static constexpr uint32_t kv_rows_marker  = 0x45584747;  // "GGXE"
static constexpr uint32_t kv_codes_marker = 0x43584747;  // "GGXC"

// In the place of a row's type.
static constexpr int32_t kv_code_type = -1;

template <class T> static void kv_put(llama_io_write_i & io, T value) {
    io.write(&value, sizeof(value));
}

template <class T> static T kv_get(llama_io_read_i & io) {
    T value;
    io.read(&value, sizeof(value));
    return value;
}

size_t ggml_ext_kv_paged::row_size(const layer & layer, bool v, bool cold) const {
    if (cold) {
        return codes->codes_size(layer.index, v);
    }
    return v ? ggml_row_size(layer.type_v, layer.dv) : ggml_row_size(layer.type_k, layer.dk);
}

char * ggml_ext_kv_paged::row(const layer & layer, bool v, int32_t slot, bool cold) const {
    if (cold) {
        return codes->codes(layer.index, v, slot);
    }
    const ggml_ext_kv_block block = block_of(layer);
    return rows.block_of(slot) + (v ? block.v : block.k) + slot % GGML_EXT_KV_SLOTS * row_size(layer, v);
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
    const auto slots_in = [&](bool cold) {
        std::vector<std::vector<int32_t>> slots;
        for (uint32_t list = 0; list < lists; ++list) {
            slots.push_back(slots_of(cold, list, stream, index, count));
        }
        return slots;
    };
    const std::vector<std::vector<int32_t>> slots = slots_in(false);
    if (codes) {
        kv_put(io, kv_codes_marker);
        kv_put(io, uint32_t(codes->channels));
    } else if (evicts()) {
        kv_put(io, kv_rows_marker);
    }
    if (codes || evicts()) {
        kv_put(io, uint32_t(rule.policy));
        kv_put(io, n_layers());
        if (codes) {
            write_part(io, true, slots_in(true));
        }
        write_part(io, false, slots);
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

// Rows, or codes, of the slots that are there. A list's cells among the state's come first.
void ggml_ext_kv_paged::write_part(llama_io_write_i & io, bool cold, std::vector<std::vector<int32_t>> slots) const {
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
            kv_put(io, cold ? kv_code_type : int32_t(v ? layer.type_v : layer.type_k));
            kv_put(io, uint64_t(row_size(layer, v, cold)));
            for (int32_t head = 0; head < layer.n_head_kv; ++head) {
                for (int32_t slot : slots[layer.first_list + head]) {
                    io.write(row(layer, v, slot, cold), row_size(layer, v, cold));
                }
            }
        }
    }
    for (uint32_t list = 0; list < lists && scored(); ++list) {
        for (int32_t slot : slots[list]) {
            io.write(score(layers[layer_of[list]], slot, cold), sizeof(float));
        }
    }
}

// Whether the state's rows, of `size` bytes, are the layer's.
static bool kv_rows_are(llama_io_read_i & io, int32_t type, uint64_t size, bool v) {
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
    if (evicts() || codes) {
        return read_present(io, cells, stream, restored);
    }
    const uint32_t v_trans = kv_get<uint32_t>(io), n_layer = kv_get<uint32_t>(io);
    if (v_trans == kv_rows_marker || v_trans == kv_codes_marker) {
        LLAMA_LOG_ERROR("%s: ggml-ext: the state was saved by a cache that %s; process the prompt anew\n", __func__,
                        v_trans == kv_rows_marker ? "evicts" : "codes what is old");
        return false;
    }
    if (v_trans != 0 || n_layer != n_layers()) {
        LLAMA_LOG_ERROR("%s: ggml-ext: the state has %u layers%s, the cache %u\n", __func__, n_layer,
                        v_trans ? " and V transposed (-fa off)" : "", n_layers());
        return false;
    }
    std::vector<uint32_t> all_cells(restored.size());
    std::iota(all_cells.begin(), all_cells.end(), 0);
    const auto slots = lay_out(false, cells, stream, restored, std::vector<std::vector<uint32_t>>(lists, all_cells));
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

// present: of each list, the cells among the state's that it has, which is written to.
bool ggml_ext_kv_paged::read_part(llama_io_read_i & io, bool cold, const llama_kv_cells & cells, uint32_t stream,
                                  const std::vector<uint32_t> &        restored,
                                  std::vector<std::vector<uint32_t>> & present) {
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
    const auto slots = lay_out(cold, cells, stream, restored, present);
    if (slots.empty()) {
        return false;
    }
    for (const bool v : { false, true }) {
        for (const layer & layer : layers) {
            if (!kv_rows_are(io, cold ? kv_code_type : int32_t(v ? layer.type_v : layer.type_k),
                             row_size(layer, v, cold), v)) {
                return false;
            }
            for (int32_t head = 0; head < layer.n_head_kv; ++head) {
                for (int32_t slot : slots[layer.first_list + head]) {
                    io.read(row(layer, v, slot, cold), row_size(layer, v, cold));
                }
            }
        }
    }
    for (uint32_t list = 0; list < lists && scored(); ++list) {
        for (int32_t slot : slots[list]) {
            io.read(score(layers[layer_of[list]], slot, cold), sizeof(float));
        }
    }
    return true;
}

// Whether no cell is in both parts and, where nothing is evicted, each is in one.
static bool kv_parts_fit(const std::vector<std::vector<uint32_t>> & codes,
                         const std::vector<std::vector<uint32_t>> & rows, size_t n, bool evicts) {
    for (size_t list = 0; list < rows.size(); ++list) {
        std::vector<uint32_t> both;
        std::set_intersection(codes[list].begin(), codes[list].end(), rows[list].begin(), rows[list].end(),
                              std::back_inserter(both));
        if (!both.empty() || (!evicts && codes[list].size() + rows[list].size() != n)) {
            LLAMA_LOG_ERROR("%s: ggml-ext: the state has a cell as rows and as codes, or as neither\n", __func__);
            return false;
        }
    }
    return true;
}

bool ggml_ext_kv_paged::read_present(llama_io_read_i & io, const llama_kv_cells & cells, uint32_t stream,
                                     const std::vector<uint32_t> & restored) {
    if (kv_get<uint32_t>(io) != (codes ? kv_codes_marker : kv_rows_marker) ||
        (codes && kv_get<uint32_t>(io) != uint32_t(codes->channels)) || kv_get<uint32_t>(io) != uint32_t(rule.policy)) {
        LLAMA_LOG_ERROR("%s: ggml-ext: the state was saved by a cache of another policy; process the prompt anew\n",
                        __func__);
        return false;
    }
    const uint32_t n_layer = kv_get<uint32_t>(io);
    if (n_layer != n_layers()) {
        LLAMA_LOG_ERROR("%s: ggml-ext: the state has %u layers, the cache %u\n", __func__, n_layer, n_layers());
        return false;
    }
    std::vector<std::vector<uint32_t>> coded(lists), present(lists);
    if (codes && !read_part(io, true, cells, stream, restored, coded)) {
        return false;
    }
    if (!read_part(io, false, cells, stream, restored, present) ||
        (codes && !kv_parts_fit(coded, present, restored.size(), evicts()))) {
        return false;
    }
    if (attended()) {
        find_boundaries(cells, stream, restored, present);
    }
    return true;
}
