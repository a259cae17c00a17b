// The KV cache in blocks of ours, or with a budget: what upstream's files call. docs/kv-cache.md has the mathematics and
// the contract.
//
// Paged: rows are in blocks that sequences share. Upstream's cells stay the truth about positions and sequences.
//
// Policy "window": a sequence keeps its first `sink` tokens and its latest ones. Upstream's cells stay the truth about
// positions and sequences; the cache has fewer of them than the context has positions, and cells that a sequence no
// longer keeps are removed at the start of the next ubatch. A sequence that has lost positions has a boundary, the
// last of them: what follows it is contiguous.

#pragma once

#include "ggml-backend.h"
#include "llama.h"

#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

class llama_io_read_i;
class llama_io_write_i;
class llama_kv_cache;
class llama_kv_cells;
struct llama_cparams;
struct llama_hparams;
struct llama_model;
struct llama_ubatch;

// What stands beneath one cache; null where it is upstream's as it is.
struct ggml_ext_kv;

// The time in which a context's memory is made, by one thread: tells the caches what context they are for.
// Throws std::runtime_error, in one line, for a GGML_EXT_KV that is wrong or that this model's memory cannot have.
class ggml_ext_kv_scope {
  public:
    ggml_ext_kv_scope(const llama_model & model, const llama_cparams & cparams);
    ~ggml_ext_kv_scope();
    ggml_ext_kv_scope(const ggml_ext_kv_scope &)             = delete;
    ggml_ext_kv_scope & operator=(const ggml_ext_kv_scope &) = delete;
};

// For a cache's constructor, when its cells are made. sliding: a cache of layers with a sliding window has its own bound
// and is left alone. Lowers kv_size, the rows of the tensors that follow, and with policy window the cells. Throws
// std::runtime_error for a budget that cannot hold sinks, recent tokens and a ubatch, and for a cache that cannot be
// paged.
std::shared_ptr<ggml_ext_kv> ggml_ext_kv_open(ggml_type type_k, ggml_type type_v, bool v_trans, bool offload,
                                              bool sliding, std::vector<llama_kv_cells> & cells, uint32_t & kv_size);

// Whether the context that is being made, or a cache, codes old rows. Codebooks know them as the model has them, so the
// cache stores them without rotation and learned transform.
bool ggml_ext_kv_will_code();
bool ggml_ext_kv_codes_rows(const ggml_ext_kv * ext);

// Whether the cache's rows are in blocks of ours.
bool ggml_ext_kv_is_paged(const ggml_ext_kv * ext);

void ggml_ext_kv_add_layer(ggml_ext_kv & ext, uint32_t il, const ggml_tensor * k, const ggml_tensor * v);
void ggml_ext_kv_allocate(ggml_ext_kv & ext);

// For a cache's constructor, when its layers are made. Throws std::runtime_error where the memory cannot be had.
template <class Layers> void ggml_ext_kv_pool(ggml_ext_kv * ext, const Layers & layers) {
    if (ggml_ext_kv_is_paged(ext)) {
        for (const auto & layer : layers) {
            ggml_ext_kv_add_layer(*ext, layer.il, layer.k, layer.v);
        }
        ggml_ext_kv_allocate(*ext);
    }
}

// Adds the blocks' bytes.
void ggml_ext_kv_sizes(const ggml_ext_kv & ext, std::map<ggml_backend_buffer_type_t, size_t> & sizes);

// Whether there are blocks for ubatches, one after the other.
bool ggml_ext_kv_fits(const ggml_ext_kv * ext, const std::vector<llama_ubatch> & ubatches);

// llama_memory_i's operations of these names, before upstream's.
void ggml_ext_kv_clear(ggml_ext_kv & ext);
void ggml_ext_kv_share(ggml_ext_kv & ext, llama_seq_id from, llama_seq_id to, llama_pos p0, llama_pos p1);
void ggml_ext_kv_keep(ggml_ext_kv & ext, llama_seq_id s);

// Stores heads x [d, n_head_kv, n_tokens] of K or V in the place of upstream's node; name: the layer's tensor. Null: the
// cache is not paged.
ggml_tensor * ggml_ext_kv_store_k(const ggml_ext_kv * ext, ggml_context * ctx, ggml_tensor * x, ggml_tensor * cells,
                                  const ggml_tensor * name);
ggml_tensor * ggml_ext_kv_store_v(const ggml_ext_kv * ext, ggml_context * ctx, ggml_tensor * x, ggml_tensor * cells,
                                  const ggml_tensor * name);

// Attention of q [d, n_head, n_tokens] over a paged cache, [dv * n_head, n_tokens], with V's transform undone. Null: k is
// no paged cache's. Attention that has no such form is refused when the graph is checked.
ggml_tensor * ggml_ext_kv_attention(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v,
                                    ggml_tensor * bias, ggml_tensor * mask, ggml_tensor * sinks, ggml_tensor * v_mla,
                                    float scale, const llama_hparams & hparams, int il);

// Rows of cells of a saved state, in the place of upstream's; write is false where the cache is not paged. Where read is
// false the caller removes the cells' sequence; those of negative positions, which that leaves, are empty already.
bool ggml_ext_kv_write(const ggml_ext_kv * ext, llama_io_write_i & io, uint32_t stream,
                       const std::vector<std::pair<uint32_t, uint32_t>> & ranges);
bool ggml_ext_kv_read(ggml_ext_kv & ext, llama_io_read_i & io, llama_kv_cells & cells, uint32_t stream,
                      const std::vector<uint32_t> & restored);

// Which cells of a stream are free for a ubatch, beside the empty ones: those of one sequence whose position that
// sequence no longer keeps then.
class ggml_ext_kv_spent {
  public:
    // cells: of one stream. ext may be null: no cell is free.
    ggml_ext_kv_spent(const ggml_ext_kv * ext, const llama_kv_cells & cells, const llama_ubatch & ubatch);

    bool operator()(const llama_kv_cells & cells, uint32_t cell) const;

    // The first position at or above `sink` that sequence s keeps; 0: all of them.
    llama_pos first_kept(llama_seq_id s) const;

  private:
    llama_pos              sink = 0;
    std::vector<llama_pos> first;  // by sequence; empty without a budget
};

// Before the ubatch gets its cells, token_cells by stream. Policy window: removes what the sequences no longer keep: its
// queries see what is left and themselves. Paged: gives it slots.
void ggml_ext_kv_begin(llama_kv_cache & cache, const llama_ubatch & ubatch,
                       const std::vector<std::vector<uint32_t>> & token_cells);

// Whether positions p0 .. p1 - 1 of sequence s (-1: of each) can go, so that what is left is what the sequence would
// have without them; paged blocks let them go. With a budget false for a part of a sequence that is not its end, and for an end that begins in front of the
// boundary where positions are missing. cells: by stream.
bool ggml_ext_kv_remove(ggml_ext_kv & ext, const std::vector<llama_kv_cells> & cells, llama_seq_id s, llama_pos p0,
                        llama_pos p1);

// The first position behind the boundary, from which on a sequence can be cut; without a boundary its first position;
// -1 for an empty sequence. cells: of the sequence's stream.
llama_pos ggml_ext_kv_pos_min(const ggml_ext_kv & ext, const llama_kv_cells & cells, llama_seq_id s);

// For a cache's saved state, in front of upstream's: a word that says positions may be missing. Reading throws
// std::runtime_error where the state has no such word. Without a budget there is none, and upstream's check of the
// streams refuses it.
void ggml_ext_kv_write_state(const ggml_ext_kv * ext, llama_io_write_i & io);
void ggml_ext_kv_read_state(const ggml_ext_kv * ext, llama_io_read_i & io);
