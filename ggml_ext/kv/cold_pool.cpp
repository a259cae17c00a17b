#include "cold_pool.h"

#include "llama-cparams.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

ggml_ext_kv_cold_pool::ggml_ext_kv_cold_pool(int channels, bool scored, int n_threads) :
    channels(channels), scored(scored), backend(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr)) {
    if (!backend) {
        throw std::runtime_error("ggml-ext: no CPU backend for the codes of a KV cache");
    }
    const ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend.get()));
    const auto               set = reinterpret_cast<ggml_backend_set_n_threads_t>(
        ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads"));
    if (set) {
        set(backend.get(), n_threads);
    }
}

ggml_ext_kv_cold_block ggml_ext_kv_cold_pool::block_of(const layer & layer) const {
    return ggml_ext_kv_cold_block_of(layer.dk, layer.dv, channels, scored);
}

void ggml_ext_kv_cold_pool::add(int32_t dk, int32_t dv, int32_t n_head_kv, ggml_tensor * books) {
    layers.push_back({ dk, dv, n_head_kv, books });
    lists += uint32_t(n_head_kv);
    block_size = std::max(block_size, block_of(layers.back()).size);
}

void ggml_ext_kv_cold_pool::allocate(uint64_t n_blocks, bool alloc) {
    pages = blocks.allocate("cache_codes", block_size, lists, n_blocks, alloc);
}

void ggml_ext_kv_cold_pool::turned(uint32_t index, const ggml_tensor * key) {
    layer &                layer = layers[index];
    const ggml_ext_kv_rope rope  = ggml_ext_kv_rope_of(key);
    if (layer.angles >= 0) {
        if (!(turns[size_t(layer.angles)].rope == rope)) {
            throw std::runtime_error(
                "ggml-ext: a graph turns keys in another way than the one before; unset GGML_EXT_KV");
        }
        return;
    }
    const auto same = [&](const turn & turn) { return turn.rope == rope; };
    const auto at   = std::find_if(turns.begin(), turns.end(), same);
    layer.angles    = int(at - turns.begin());
    if (at != turns.end()) {
        return;
    }
    turn made;
    made.rope = rope;
    if (rope.n_rot > 0) {
        made.context.reset(ggml_init({ ggml_tensor_overhead(), nullptr, true }));
        made.angles = ggml_new_tensor_2d(made.context.get(), GGML_TYPE_F32, rope.n_rot, 2 * GGML_EXT_KV_TURN);
        ggml_set_name(made.angles, "cache_angles");
        made.buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(made.context.get(), ggml_backend_cpu_buffer_type()));
        if (!made.buffer) {
            throw std::runtime_error("ggml-ext: no memory for the angles of a KV cache's codes");
        }
        ggml_ext_kv_angles(rope, static_cast<float *>(made.angles->data));
    }
    turns.push_back(std::move(made));
}

ggml_ext_kv_cold_params ggml_ext_kv_cold_pool::params_of(const layer & layer) const {
    const ggml_ext_kv_rope & rope = turns.at(size_t(layer.angles)).rope;
    ggml_ext_kv_cold_params  p    = {};
    p.channels                    = channels;
    p.n_rot                       = rope.n_rot;
    p.neox                        = rope.neox;
    p.length                      = rope.length;
    return p;
}

ggml_ext_kv_codes ggml_ext_kv_cold_pool::codes_of(uint32_t index) const {
    const layer & layer = layers[index];
    return { blocks.tensor(), layer.books, turns.at(size_t(layer.angles)).angles, params_of(layer) };
}

void ggml_ext_kv_cold_pool::encode(ggml_tensor * rows, const std::vector<std::vector<move>> & moves) const {
    size_t words = 0;
    for (const std::vector<move> & of_layer : moves) {
        words += 3 * of_layer.size();
    }
    const size_t memory = ggml_graph_overhead() + (2 * moves.size() + 1) * (ggml_tensor_overhead() + GGML_MEM_ALIGN) +
                          words * sizeof(int32_t);
    const ggml_context_ptr graphs(ggml_init({ memory, nullptr, false }));
    ggml_cgraph *          graph  = ggml_new_graph(graphs.get());
    ggml_tensor *          result = blocks.tensor();
    for (uint32_t il = 0; il < moves.size(); ++il) {
        if (moves[il].empty()) {
            continue;
        }
        const ggml_ext_kv_codes codes = codes_of(il);
        ggml_tensor *           list  = ggml_new_tensor_2d(graphs.get(), GGML_TYPE_I32, 3, int64_t(moves[il].size()));
        std::memcpy(list->data, moves[il].data(), ggml_nbytes(list));
        ggml_ext_kv_code_params p = {};
        p.cold                    = codes.p;
        p.dk                      = layers[il].dk;
        p.dv                      = layers[il].dv;
        p.scored                  = scored;
        result                    = ggml_ext_kv_code(graphs.get(), result, rows, list, codes.books, codes.angles, &p);
        ggml_build_forward_expand(graph, result);
    }
    if (ggml_backend_graph_compute(backend.get(), graph) != GGML_STATUS_SUCCESS) {
        throw std::runtime_error("ggml-ext: old tokens of a KV cache could not be coded");
    }
}

float * ggml_ext_kv_cold_pool::score(uint32_t layer, int32_t slot) const {
    return reinterpret_cast<float *>(blocks.block_of(slot) + block_of(layers[layer]).score) + slot % GGML_EXT_KV_SLOTS;
}

size_t ggml_ext_kv_cold_pool::codes_size(uint32_t layer, bool v) const {
    const ggml_ext_kv_cold_block block = block_of(layers[layer]);
    return v ? block.v_row : block.k_row;
}

char * ggml_ext_kv_cold_pool::codes(uint32_t layer, bool v, int32_t slot) const {
    const ggml_ext_kv_cold_block block = block_of(layers[layer]);
    return blocks.block_of(slot) + (v ? block.v : block.k) + size_t(slot % GGML_EXT_KV_SLOTS) * codes_size(layer, v);
}

void ggml_ext_kv_cold_pool::move_slot(uint32_t layer, int32_t from, int32_t to) const {
    for (const bool v : { false, true }) {
        std::memcpy(codes(layer, v, to), codes(layer, v, from), codes_size(layer, v));
    }
    if (scored) {
        *score(layer, to) = *score(layer, from);
    }
    pages.positions(to / GGML_EXT_KV_SLOTS)[to % GGML_EXT_KV_SLOTS] =
        pages.positions(from / GGML_EXT_KV_SLOTS)[from % GGML_EXT_KV_SLOTS];
}
