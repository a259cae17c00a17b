// Which blocks of a pool hold which tokens: lists of runs per sequence, layer and head, blocks shared by reference.
// Knows nothing of llama.cpp. docs/kv-cache.md explains it.

#pragma once

#include "kv_store/block.h"
#include "llama.h"

#include <algorithm>
#include <cstdint>
#include <map>
#include <vector>

// A lane is what one sequence sees: n_lists lists, each of runs with rising positions. Blocks are only appended to, so
// lanes share a block's slots by holding runs of it; a lane that goes its own way starts a block of its own. A block
// without runs is free.
class ggml_ext_kv_pages {
  public:
    ggml_ext_kv_pages(uint32_t n_lanes, uint32_t n_lists, uint32_t n_blocks);

    // Where the blocks' positions are: block b's 64 at positions + b * stride (int32 units). Null: not kept, for a copy
    // that is asked whether something fits.
    void keep_positions(int32_t * first, size_t stride);

    uint32_t n_lists() const { return lists_per_lane; }

    uint32_t n_lanes() const { return uint32_t(lists.size() / std::max(1u, lists_per_lane)); }

    uint32_t n_blocks() const { return uint32_t(blocks.size()); }

    uint32_t n_free() const { return uint32_t(free_blocks.size()); }

    // Whether a lane's list has a position behind this one.
    bool holds_behind(uint32_t lane, uint32_t list, llama_pos position) const;

    // Blocks that n more tokens of a lane take at most, where no token is of several lanes.
    uint64_t n_needed(uint32_t lane, uint32_t n) const;

    // A token at `position`, behind what the lanes hold: stored once, for the first lane's lists, and seen by the others.
    // slots[list] = block * 64 + slot. False, with nothing to rely on, where the free blocks do not suffice.
    bool append(const llama_seq_id * lanes, uint32_t n_lanes, llama_pos position, int32_t * slots);

    // A token of one list, anywhere between those that the lanes hold there: stored once, for the first lane, and seen by
    // the others. Returns block * 64 + slot, or -1, with nothing changed, where no block is free.
    int32_t insert(uint32_t list, const std::vector<llama_seq_id> & lanes, llama_pos position);

    // Takes positions p0 .. p1 - 1 out of a lane.
    void remove(uint32_t lane, llama_pos p0, llama_pos p1);

    // Lets lane `to` see positions p0 .. p1 - 1 of lane `from`, too. False, with nothing changed, where it holds one of them
    // in another slot.
    bool share(uint32_t from, uint32_t to, llama_pos p0, llama_pos p1);

    // Whether a lane's list has one of positions p0 .. p1 - 1 that a lane of other pages has in it, too.
    bool meets(uint32_t lane, const ggml_ext_kv_pages & other, uint32_t other_lane, uint32_t list, llama_pos p0,
               llama_pos p1) const;

    void clear(uint32_t lane);

    // The blocks of a list, each once, in the order in which lanes hold them.
    std::vector<int32_t> blocks_of(uint32_t list) const;

    // Lanes see a list's slots elsewhere, after these were moved: slot i of all of `order`, which is blocks_of(list), is
    // now slot target[i] of them, -1: gone. Targets are 0, 1, ... in the order of the slots that stay.
    void pack(uint32_t list, const std::vector<int32_t> & order, const std::vector<int32_t> & target);

    // Whether run i of a list is a whole block, from position 64 i on.
    bool is_whole(uint32_t lane, uint32_t list, size_t i) const;

    // Lets run i, a whole block, be another one.
    void replace(uint32_t lane, uint32_t list, size_t i, int32_t block);

    // Changes whenever a block's tokens are others than they were, and with its being free.
    uint32_t generation(int32_t block) const { return blocks[block].generation; }

    // Runs that lie in a block, of all lanes.
    uint32_t references(int32_t block) const { return blocks[block].references; }

    const std::vector<ggml_ext_kv_entry> & list(uint32_t lane, uint32_t list) const {
        return lists[size_t(lane) * lists_per_lane + list];
    }

    // Tokens in slots `slot` .. of `block`, of one list: fills fresh blocks; the lanes get runs by `show`.
    int32_t take_block();
    void    show(uint32_t lane, uint32_t list, int32_t block, uint32_t slot);

    int32_t * positions(int32_t block) const { return first_position + size_t(block) * position_stride; }

  private:
    struct state {
        uint32_t references = 0;  // runs that lie in it
        uint32_t fill       = 0;  // slots that were written
        uint32_t generation = 0;
    };

    std::vector<ggml_ext_kv_entry> & runs(uint32_t lane, uint32_t list) {
        return lists[size_t(lane) * lists_per_lane + list];
    }

    llama_pos first_of(const ggml_ext_kv_entry & entry) const { return positions(entry.block)[entry.begin]; }

    llama_pos last_of(const ggml_ext_kv_entry & entry) const {
        return positions(entry.block)[entry.begin + entry.count - 1];
    }

    // The part of a run in p0 .. p1 - 1, which may be empty.
    ggml_ext_kv_entry part(const ggml_ext_kv_entry & entry, llama_pos p0, llama_pos p1) const;

    // The slots of positions p0 .. p1 - 1 of a list.
    std::map<llama_pos, int32_t> slots_of(uint32_t lane, uint32_t list, llama_pos p0, llama_pos p1) const;

    bool join(uint32_t from, uint32_t to, uint32_t list, llama_pos p0, llama_pos p1,
              std::vector<ggml_ext_kv_entry> & joined) const;

    uint32_t room(const ggml_ext_kv_entry & last) const;
    int32_t  next_slot(const ggml_ext_kv_entry * last);
    void     place(uint32_t lane, uint32_t list, llama_pos position, int32_t slot);
    void     release(int32_t block);

    uint32_t                                    lists_per_lane;
    std::vector<std::vector<ggml_ext_kv_entry>> lists;        // [n_lanes][n_lists]
    std::vector<state>                          blocks;
    std::vector<int32_t>                        free_blocks;  // the last is taken first
    int32_t *                                   first_position  = nullptr;
    size_t                                      position_stride = 0;
};
