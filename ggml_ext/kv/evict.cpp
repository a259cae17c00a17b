#include "evict.h"

#include <algorithm>
#include <array>
#include <bitset>
#include <cmath>
#include <map>
#include <tuple>

namespace {

constexpr uint32_t slots_per_block = GGML_EXT_KV_SLOTS;

struct candidate {
    float   score;
    int32_t position;
    int32_t slot;

    // Among equals the oldest goes first.
    bool operator<(const candidate & other) const {
        return std::tie(score, position, slot) < std::tie(other.score, other.position, other.slot);
    }
};

// The slots that some lane holds in a list, and those among them that a lane needs.
struct list_slots {
    std::vector<candidate> evictable;
    uint32_t               n_kept = 0;
};

using block_scores = std::array<float, slots_per_block>;

// Scores of the slots of a list's blocks, each the highest of its neighbours' in the lanes that hold it. Neighbours that
// nothing has looked at yet (+Inf) count for nothing.
std::map<int32_t, block_scores> pooled_scores(const ggml_ext_kv_pages & pages, uint32_t list,
                                              const ggml_ext_kv_eviction & rule) {
    std::map<int32_t, block_scores> pooled;
    for (uint32_t lane = 0; lane < pages.n_lanes() && rule.pool > 0; ++lane) {
        std::vector<std::pair<float *, float>> row;
        for (const ggml_ext_kv_entry & run : pages.list(lane, list)) {
            const auto [at, fresh] = pooled.emplace(run.block, block_scores());
            if (fresh) {
                at->second.fill(-INFINITY);
            }
            for (uint32_t i = run.begin; i < uint32_t(run.begin + run.count); ++i) {
                row.emplace_back(&at->second[i], rule.score(list, run.block * int32_t(slots_per_block) + int32_t(i)));
            }
        }
        for (size_t i = 0; i < row.size(); ++i) {
            float best = row[i].second;
            for (size_t j = i - std::min<size_t>(i, rule.pool); j < std::min(row.size(), i + rule.pool + 1); ++j) {
                best = row[j].second < INFINITY ? std::max(best, row[j].second) : best;
            }
            *row[i].first = std::max(*row[i].first, best);
        }
    }
    return pooled;
}

// Held and needed slots of a list's blocks, a bit each.
std::map<int32_t, std::pair<uint64_t, uint64_t>> held_and_needed(const ggml_ext_kv_pages & pages, uint32_t list,
                                                                 const ggml_ext_kv_eviction & rule) {
    std::map<int32_t, std::pair<uint64_t, uint64_t>> blocks;
    for (uint32_t lane = 0; lane < pages.n_lanes(); ++lane) {
        const std::vector<ggml_ext_kv_entry> & runs = pages.list(lane, list);
        if (runs.empty()) {
            continue;
        }
        const llama_pos end =
            pages.positions(runs.back().block)[runs.back().begin + runs.back().count - 1] + 1 - llama_pos(rule.recent);
        for (const ggml_ext_kv_entry & run : runs) {
            auto & [held, needed] = blocks[run.block];
            for (uint32_t i = run.begin; i < uint32_t(run.begin + run.count); ++i) {
                const llama_pos position = pages.positions(run.block)[i];
                held |= uint64_t(1) << i;
                needed |= uint64_t(position < llama_pos(rule.sink) || position >= end) << i;
            }
        }
    }
    return blocks;
}

list_slots slots_of(const ggml_ext_kv_pages & pages, uint32_t list, const ggml_ext_kv_eviction & rule) {
    list_slots                            result;
    const std::map<int32_t, block_scores> pooled = pooled_scores(pages, list, rule);
    for (const auto & [block, bits] : held_and_needed(pages, list, rule)) {
        for (uint32_t i = 0; i < slots_per_block; ++i) {
            const int32_t slot = block * int32_t(slots_per_block) + int32_t(i);
            if (bits.second >> i & 1) {
                result.n_kept++;
            } else if (bits.first >> i & 1) {
                // No order has NaN in it.
                const float score = rule.pool > 0 ? pooled.at(block)[i] : rule.score(list, slot);
                result.evictable.push_back({ std::isnan(score) ? -INFINITY : score, pages.positions(block)[i], slot });
            }
        }
    }
    return result;
}

uint32_t blocks_for(uint32_t n_slots) {
    return (n_slots + slots_per_block - 1) / slots_per_block;
}

// Of all lists' droppable slots, the lowest ones that make the blocks suffice; empty where none do.
std::vector<std::vector<int32_t>> choose(std::vector<list_slots> & lists, uint32_t n_blocks, double floor) {
    struct droppable {
        candidate what;
        uint32_t  list;

        bool operator<(const droppable & other) const {
            return std::tie(what, list) < std::tie(other.what, other.list);
        }
    };

    const uint32_t least = uint32_t(floor * n_blocks / double(std::max<size_t>(1, lists.size()))) * slots_per_block;
    std::vector<droppable> all;
    std::vector<uint32_t>  n(lists.size());
    uint64_t               used = 0;
    for (uint32_t i = 0; i < lists.size(); ++i) {
        std::vector<candidate> & slots = lists[i].evictable;
        n[i]                           = lists[i].n_kept + uint32_t(slots.size());
        used += blocks_for(n[i]);
        const uint32_t keeps = std::max(lists[i].n_kept, std::min(n[i], least));
        std::sort(slots.begin(), slots.end());
        for (uint32_t j = 0; j < n[i] - keeps; ++j) {
            all.push_back({ slots[j], i });
        }
    }
    std::sort(all.begin(), all.end());
    std::vector<std::vector<int32_t>> dropped(lists.size());
    for (const droppable & slot : all) {
        if (used <= n_blocks) {
            break;
        }
        used -= blocks_for(n[slot.list]) - blocks_for(n[slot.list] - 1);
        n[slot.list]--;
        dropped[slot.list].push_back(slot.what.slot);
    }
    return used <= n_blocks ? dropped : std::vector<std::vector<int32_t>>();
}

void drop(ggml_ext_kv_pages & pages, uint32_t list, std::vector<int32_t> & slots, const ggml_ext_kv_eviction & rule) {
    std::sort(slots.begin(), slots.end());
    const std::vector<int32_t> order = pages.blocks_of(list);
    std::vector<uint64_t>      held(order.size());
    std::map<int32_t, size_t>  index;
    for (size_t b = 0; b < order.size(); ++b) {
        index[order[b]] = b;
    }
    for (uint32_t lane = 0; lane < pages.n_lanes(); ++lane) {
        for (const ggml_ext_kv_entry & run : pages.list(lane, list)) {
            for (uint32_t i = run.begin; i < uint32_t(run.begin + run.count); ++i) {
                held[index[run.block]] |= uint64_t(1) << i;
                if (rule.lost &&
                    std::binary_search(slots.begin(), slots.end(), run.block * int32_t(slots_per_block) + int32_t(i))) {
                    rule.lost(lane, pages.positions(run.block)[i]);
                }
            }
        }
    }
    std::vector<int32_t> target(order.size() * slots_per_block, -1);
    int32_t              n = 0;
    for (size_t i = 0; i < target.size(); ++i) {
        const int32_t from = order[i / slots_per_block] * int32_t(slots_per_block) + int32_t(i % slots_per_block);
        if ((held[i / slots_per_block] >> i % slots_per_block & 1) &&
            !std::binary_search(slots.begin(), slots.end(), from)) {
            const int32_t to =
                order[n / int32_t(slots_per_block)] * int32_t(slots_per_block) + n % int32_t(slots_per_block);
            if (to != from) {
                rule.move(list, from, to);
            }
            target[i] = n++;
        }
    }
    pages.pack(list, order, target);
}

}  // namespace

uint32_t ggml_ext_kv_needed(const ggml_ext_kv_pages & pages, const ggml_ext_kv_eviction & rule, uint32_t list) {
    size_t n = 0;
    for (const auto & [block, bits] : held_and_needed(pages, list, rule)) {
        n += std::bitset<slots_per_block>(bits.second).count();
    }
    return uint32_t(n);
}

bool ggml_ext_kv_evict(ggml_ext_kv_pages & pages, const ggml_ext_kv_eviction & rule, uint32_t wanted) {
    if (wanted <= pages.n_free()) {
        return true;
    }
    if (wanted > pages.n_blocks()) {
        return false;
    }
    std::vector<list_slots> lists;
    for (uint32_t list = 0; list < pages.n_lists(); ++list) {
        lists.push_back(slots_of(pages, list, rule));
    }
    std::vector<std::vector<int32_t>> dropped = choose(lists, pages.n_blocks() - wanted, rule.floor);
    for (uint32_t list = 0; list < dropped.size(); ++list) {
        // Also where nothing goes: blocks that are half empty after cuts are counted as packed.
        drop(pages, list, dropped[list], rule);
    }
    return !dropped.empty();
}
