// A budget for the KV cache: what upstream's files call. docs/kv-cache.md has the mathematics and the contract.
//
// Policy "window": a sequence keeps its first `sink` tokens and its latest ones. Upstream's cells stay the truth about
// positions and sequences; the cache has fewer of them than the context has positions, and cells that a sequence no
// longer keeps are removed at the start of the next ubatch. A sequence that has lost positions has a boundary, the
// last of them: what follows it is contiguous.

#pragma once

#include "llama.h"

#include <cstdint>
#include <memory>
#include <vector>

class llama_io_read_i;
class llama_io_write_i;
class llama_kv_cache;
class llama_kv_cells;
struct llama_cparams;
struct llama_model;
struct llama_ubatch;

// The budget of one cache; null where it has a cell for every position of the context.
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

// For a cache's constructor. sliding: a cache of layers with a sliding window has its own bound and gets no budget.
// Lowers kv_size, the cells of a stream. Throws std::runtime_error for a budget that cannot hold sinks, recent tokens
// and a ubatch.
std::shared_ptr<ggml_ext_kv> ggml_ext_kv_open(uint32_t n_stream, bool sliding, uint32_t & kv_size);

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

// Removes what the sequences no longer keep, before the ubatch gets its cells: its queries see what is left and
// themselves.
void ggml_ext_kv_begin(llama_kv_cache & cache, const llama_ubatch & ubatch);

// Whether positions p0 .. p1 - 1 of sequence s (-1: of each) can go, so that what is left is what the sequence would
// have without them. False for a part of a sequence that is not its end, and for an end that begins in front of the
// boundary where positions are missing. cells: by stream.
bool ggml_ext_kv_remove(const ggml_ext_kv & ext, const std::vector<llama_kv_cells> & cells, llama_seq_id s,
                        llama_pos p0, llama_pos p1);

// The first position behind the boundary, from which on a sequence can be cut; without a boundary its first position;
// -1 for an empty sequence. cells: of the sequence's stream.
llama_pos ggml_ext_kv_pos_min(const llama_kv_cells & cells, llama_seq_id s);

// For a cache's saved state, in front of upstream's: a word that says positions may be missing. Reading throws
// std::runtime_error where the state has no such word. Without a budget there is none, and upstream's check of the
// streams refuses it.
void ggml_ext_kv_write_state(const ggml_ext_kv * ext, llama_io_write_i & io);
void ggml_ext_kv_read_state(const ggml_ext_kv * ext, llama_io_read_i & io);
