// Equal beginnings of sequences that know nothing of each other: found by their tokens, stored once. A beginning is
// followed a block of 64 tokens at a time; nothing is compared by a hash alone. docs/kv-cache.md explains it.

#pragma once

#include "pages.h"

#include <array>
#include <cstdint>
#include <map>
#include <utility>
#include <vector>

class ggml_ext_kv_prefixes {
  public:
    explicit ggml_ext_kv_prefixes(uint32_t n_lanes) : lanes(n_lanes) {}

    // A token of a lane and the kind of graph that computed its rows: rows of different kinds are different. Counts where
    // the lane's tokens are known from position 0 on.
    void add(uint32_t lane, llama_pos position, llama_token token, uint32_t kind);

    // Positions from p0 on are gone, or are no longer in a row.
    void cut(uint32_t lane, llama_pos p0);

    // Lane `to` holds positions p0 .. p1 - 1 of lane `from`.
    void copy(uint32_t from, uint32_t to, llama_pos p0, llama_pos p1);

    // Lets the lane hold the blocks of an equal beginning, and others the lane's: whole blocks only.
    void merge(uint32_t lane, ggml_ext_kv_pages & pages);

  private:
    static constexpr size_t n_slots = GGML_EXT_KV_SLOTS;

    using block_tokens = std::array<std::pair<llama_token, uint32_t>, n_slots>;

    struct node {
        uint64_t                                  id;      // never used again
        std::vector<std::pair<int32_t, uint32_t>> blocks;  // per list, with its generation
    };

    struct lane {
        std::vector<std::pair<llama_token, uint32_t>> tokens;
        std::vector<uint64_t>                         path;  // nodes of its whole blocks that were merged
    };

    static bool alive(const node & node, const ggml_ext_kv_pages & pages);
    void        purge(const ggml_ext_kv_pages & pages);

    std::vector<lane>                                 lanes;
    std::map<std::pair<uint64_t, block_tokens>, node> nodes;  // by what comes before, 0: nothing, and its tokens
    uint64_t                                          n_ids = 0;
};
