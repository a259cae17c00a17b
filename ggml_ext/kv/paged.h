// Paged storage of one KV cache: upstream's cells say which sequence has which position, and where in the mask; the
// pages, which block holds its rows. docs/kv-cache.md explains it.

#pragma once

#include "cold_pool.h"
#include "core/ext_op.h"
#include "evict.h"
#include "ggml.h"
#include "llama.h"
#include "pages.h"
#include "pool.h"
#include "prefixes.h"
#include "setting.h"
#include "usage.h"

#include <cstdint>
#include <map>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

// A sequence's positions are below: each has an entry in tables.
constexpr llama_pos GGML_EXT_KV_POSITIONS = 1 << 24;

// Of a position in a list: any order, the same for equal runs.
float ggml_ext_kv_random(uint32_t list, llama_pos position);

class llama_io_read_i;
class llama_io_write_i;
class llama_kv_cells;
struct llama_ubatch;

// A lane of the pages is a sequence.
class ggml_ext_kv_paged {
  public:
    struct layer {
        int32_t   dk, dv, n_head_kv;
        ggml_type type_k, type_v;
        uint32_t  first_list;  // of its heads'
        uint32_t  il;
        uint32_t  index;       // among the cache's layers
    };

    // n_cells: of a stream; rule: which slots go where blocks are short, and whether old ones become codes; n_seq:
    // sequences; n_threads: that code.
    ggml_ext_kv_paged(uint32_t n_cells, uint32_t n_stream, const ggml_ext_kv_setting & rule, uint32_t n_seq,
                      int n_threads);

    // The cache's next layer; k, v: upstream's tensors of it, which have no rows and name it; books: its codebooks.
    void add(layer layer, const ggml_tensor * k, const ggml_tensor * v, ggml_tensor * books);

    // Makes the pools once all layers are there. Without alloc they have their size and no memory. Throws
    // std::runtime_error where the memory cannot be had.
    void allocate(uint64_t blocks_per_list, uint64_t cold_blocks_per_list, bool alloc);

    // The layer that a tensor, or what it is a view of, names; null: none.
    const layer * find(const ggml_tensor * name) const;

    // Whether the blocks suffice for ubatches, one after the other.
    bool fits(const std::vector<llama_ubatch> & ubatches);

    // Slots for a ubatch's tokens, before its graph is built; token_cells: their cells, in their order.
    void begin(const llama_ubatch & ubatch, const std::vector<uint32_t> & token_cells);

    // The sequence operations of llama_memory_i; s < 0: each sequence.
    void remove(llama_seq_id s, llama_pos p0, llama_pos p1);
    void share(llama_seq_id from, llama_seq_id to, llama_pos p0, llama_pos p1);
    void keep(llama_seq_id s);
    void clear();

    // Rows of cells of a stream of a saved state, behind the cells' own part: in upstream's format, or in our own where
    // slots can be missing. Reading is false where the state is of another cache or the blocks do not suffice.
    void write(llama_io_write_i & io, uint32_t stream, const std::vector<std::pair<uint32_t, uint32_t>> & ranges) const;
    bool read(llama_io_read_i & io, const llama_kv_cells & cells, uint32_t stream,
              const std::vector<uint32_t> & restored);

    // What a graph's inputs must hold: entries of the longest list and positions of the lanes of the ubatch that has
    // begun, or of a full cache where none has.
    uint32_t n_entries() const;
    uint32_t n_positions() const;

    // The inputs of a ubatch, as ggml_ext_kv_store and ggml_ext_kv_attend want them: slots [n_tokens][n_lists], table,
    // cells [n_lanes][n_positions], order.
    void fill_slots(int32_t * to) const;
    void fill_table(int32_t * to, uint32_t n_lanes) const;
    void fill_cells(int32_t * to, uint32_t n_lanes, uint32_t n_positions) const;
    void fill_order(int32_t * to, uint32_t n_lanes) const;

    // The graph has its inputs. Graphs of one kind compute the same rows from the same tokens; kind 0 promises nothing.
    void end(uint32_t kind);

    // The number of a kind by what makes it; 0 for nothing.
    uint32_t number_of(const std::vector<uint64_t> & kind);

    uint32_t n_lists() const { return lists; }

    // Old tokens' codes; null: they stay rows.
    ggml_ext_kv_cold_pool * cold() const { return codes.get(); }

    // Whether slots go where blocks are short, and whether by a score that the graph stores behind their rows.
    bool evicts() const { return rule.policy != ggml_ext_kv_policy::keep; }

    bool scored() const { return evicts() && policy() != ggml_ext_kv_policy::random; }

    ggml_ext_kv_policy policy() const { return rule.policy; }

    // Whether scores are what earlier queries looked at, so that what is left of a sequence is of use to what follows them
    // and to nothing else.
    bool attended() const { return policy() == ggml_ext_kv_policy::attention; }

    // The last position of a sequence that some head has evicted by what queries behind it looked at; -1: none.
    llama_pos last_lost(llama_seq_id s) const { return boundary[s]; }

    // Whether positions p0 .. p1 - 1 of sequence s (-1: of each) can go: all of it, or what begins behind that position.
    bool removable(llama_seq_id s, llama_pos p0, llama_pos p1) const;

    // Parameters of kv_score but for its layer's; whether a ubatch of so many tokens has queries enough to score by.
    ggml_ext_kv_score_params scoring() const;
    static bool              scores_by(int64_t n_tokens);

    // Blocks of each list that a cache where room is made must have for ubatches of n_ubatch tokens.
    uint64_t least_blocks(uint32_t n_ubatch) const;

    ggml_ext_kv_block block_of(const layer & layer) const {
        return ggml_ext_kv_block_of(layer.type_k, layer.dk, layer.type_v, layer.dv, scored());
    }

    size_t size() const { return rows.size() + (codes ? codes->size() : 0); }

    // Bytes of a block for each list.
    size_t list_size() const { return block_size * lists; }

    // What a sequence holds, but for how many tokens it has in all.
    ggml_ext_kv_usage usage(llama_seq_id s) const;

    uint32_t n_layers() const { return uint32_t(layers.size()); }

    ggml_tensor * pool() const { return rows.tensor(); }

    const uint32_t n_cells, n_stream;

  private:
    void                 merge();
    uint64_t             most_blocks(const llama_ubatch & ubatch, bool with_room) const;
    bool                 can_fit(const std::vector<llama_ubatch> & ubatches) const;
    bool                 holds(llama_seq_id s) const;
    uint64_t             lone_blocks(uint32_t n_tokens) const;
    uint64_t             staying_blocks() const;
    uint64_t             staying_blocks(const std::vector<bool> & used, uint64_t before) const;
    ggml_ext_kv_eviction keeps() const;
    bool                 is_lone(const llama_ubatch & ubatch) const;
    bool                 make_room(const llama_ubatch & ubatch);
    bool                 make_room(uint64_t wanted, uint32_t incoming);
    bool                 cool(bool lone);
    bool                 share_pages(uint32_t from, uint32_t to, llama_pos p0, llama_pos p1);
    bool                 has_cold_room(const std::vector<llama_ubatch> & ubatches) const;
    bool                 make_cold_room(uint64_t wanted, uint32_t incoming);
    bool                 make_cold_room(const std::vector<std::vector<ggml_ext_kv_old_slot>> & old, bool lone);
    ggml_ext_kv_eviction eviction() const;
    void    find_boundaries(const llama_kv_cells & cells, uint32_t stream, const std::vector<uint32_t> & restored,
                            const std::vector<std::vector<uint32_t>> & present);
    size_t  row_size(const layer & layer, bool v, bool cold = false) const;
    char *  row(const layer & layer, bool v, int32_t slot, bool cold = false) const;
    float * score(const layer & layer, int32_t slot, bool cold = false) const;
    void    move(uint32_t list, int32_t from, int32_t to, uint32_t n) const;

    ggml_ext_kv_pages &       pages_of(bool cold) { return cold ? codes->pages : held; }
    const ggml_ext_kv_pages & pages_of(bool cold) const { return cold ? codes->pages : held; }

    std::pair<uint32_t, uint32_t> lanes_of(uint32_t stream) const;
    std::vector<int32_t> slots_of(bool cold, uint32_t list, uint32_t stream, const std::vector<int32_t> & index,
                                  size_t count) const;
    std::vector<std::vector<int32_t>> lay_out(bool cold, const llama_kv_cells & cells, uint32_t stream,
                                              const std::vector<uint32_t> &              restored,
                                              const std::vector<std::vector<uint32_t>> & present);
    void write_part(llama_io_write_i & io, bool cold, std::vector<std::vector<int32_t>> slots) const;
    bool read_part(llama_io_read_i & io, bool cold, const llama_kv_cells & cells, uint32_t stream,
                   const std::vector<uint32_t> & restored, std::vector<std::vector<uint32_t>> & present);
    bool read_present(llama_io_read_i & io, const llama_kv_cells & cells, uint32_t stream,
                      const std::vector<uint32_t> & restored);

    const ggml_ext_kv_setting                         rule;
    const uint32_t                                    n_seq;
    std::vector<layer>                                layers;
    std::vector<uint32_t>                             layer_of;  // of a list
    std::unordered_map<const ggml_tensor *, uint32_t> names;
    uint32_t                                          lists      = 0;
    size_t                                            block_size = 0;  // of the largest layer
    ggml_ext_kv_pool                                  rows;
    ggml_ext_kv_pages                                 held;            // of rows
    ggml_ext_kv_prefixes                              prefixes;
    std::vector<std::vector<int32_t>>                 cell_of;         // [lane][position] that it holds
    std::vector<llama_pos>                            boundary;        // of each lane, as last_lost has it
    std::unique_ptr<ggml_ext_kv_cold_pool>            codes;

    // The ubatch.
    bool                      begun = false;
    std::vector<int32_t>      slots;    // [n_tokens][n_lists]
    std::vector<llama_seq_id> lanes;    // that its tokens see, in the order of their first tokens
    std::vector<uint32_t>     lane_of;  // of each token, index into lanes

    struct token {
        uint32_t     index;  // in the ubatch
        llama_seq_id lane;
        llama_pos    position;
        llama_token  id;
    };

    std::vector<token> tokens;  // of the ubatch and of each of their sequences, none where it has none
    bool               computed = false;
    uint32_t           kind     = 0;

    std::map<std::vector<uint64_t>, uint32_t> kinds;
};
