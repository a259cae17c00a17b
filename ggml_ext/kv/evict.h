// Eviction by head: which slots of a pool go when blocks are short. Knows nothing of llama.cpp. docs/kv-cache.md has the
// rule.

#pragma once

#include "pages.h"

#include <cstdint>
#include <functional>
#include <vector>

struct ggml_ext_kv_eviction {
    uint32_t sink;    // first positions of a sequence that stay
    uint32_t recent;  // latest ones that stay
    double floor;   // share of an even split, in whole blocks, that no list goes below; 1: lists stay as long as others
    uint32_t pool;  // a slot has the highest score within so many places of it in a lane's list, +Inf apart; 0: its own

    uint32_t incoming;  // tokens that the only lane with any gets next in each list: room in its last block counts

    // Of a slot of a list, block * 64 + place: the lowest go first, NaN before all.
    std::function<float(uint32_t list, int32_t slot)>                        score;
    // Rows, scores and positions of n slots of a block become those of n slots of one block, which may be among them.
    // Slots move downwards in their list only.
    std::function<void(uint32_t list, int32_t from, int32_t to, uint32_t n)> move;
    // A lane loses a position of a list; called before anything moves. Empty: nobody asks.
    std::function<void(uint32_t lane, llama_pos position)>                   lost;
};

// Slots of a list that no eviction takes: sinks and recent positions of some lane.
uint32_t ggml_ext_kv_needed(const ggml_ext_kv_pages & pages, const ggml_ext_kv_eviction & rule, uint32_t list);

// A slot of a list that no lane needs, and who sees it.
struct ggml_ext_kv_old_slot {
    int32_t                   slot;  // block * 64 + place
    llama_pos                 position;
    std::vector<llama_seq_id> lanes;
};

// Those of a list, by position.
std::vector<ggml_ext_kv_old_slot> ggml_ext_kv_old_slots(const ggml_ext_kv_pages & pages, uint32_t list,
                                                        const ggml_ext_kv_eviction & rule);

// Takes slots out of a list, whatever the rule says of them, and packs what stays as evict does. Nobody is told what a lane
// has lost.
void ggml_ext_kv_drop(ggml_ext_kv_pages & pages, uint32_t list, const std::vector<int32_t> & slots,
                      const ggml_ext_kv_eviction & rule);

// Takes slots out of all lists until `wanted` blocks are free, and those that incoming tokens take: those of the lowest scores, wherever they are, but no sinks
// and recent positions of any lane, and no more of a list than its floor allows. Lanes that share a slot lose it together.
// What stays is packed. False, with nothing changed, where that does not suffice.
bool ggml_ext_kv_evict(ggml_ext_kv_pages & pages, const ggml_ext_kv_eviction & rule, uint32_t wanted);
