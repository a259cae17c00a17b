#include "evict.h"

#include <algorithm>
#include <array>
#include <bitset>
#include <cmath>
#include <functional>
#include <queue>
#include <tuple>

namespace {

constexpr uint32_t slots_per_block = GGML_EXT_KV_SLOTS;

using block_bits = uint64_t;  // one per slot
static_assert(slots_per_block == 64, "block_bits");

block_bits bits_of(uint32_t begin, uint32_t count) {
    return count > 0 ? ~block_bits(0) >> (slots_per_block - count) << begin : 0;
}

uint32_t count_of(block_bits bits) {
    return uint32_t(std::bitset<slots_per_block>(bits).count());
}

// A block of a list: slots that some lane holds, and among them those that a lane needs and those that go.
struct held_block {
    int32_t    block;
    block_bits held = 0, needed = 0, gone = 0;
};

// Of each list the blocks, in the order of pages.blocks_of; of each block its index in the only list that has it.
struct held_slots {
    std::vector<std::vector<held_block>> lists;
    std::vector<uint32_t>                index;  // [n_blocks]
};

struct candidate {
    float    score;
    int32_t  position;
    int32_t  slot;
    uint32_t list;

    // Among equals the oldest goes first.
    bool operator<(const candidate & other) const {
        return std::tie(score, position, slot) < std::tie(other.score, other.position, other.slot);
    }

    bool operator>(const candidate & other) const { return other < *this; }
};

using lowest_first = std::priority_queue<candidate, std::vector<candidate>, std::greater<>>;

// The blocks of a list, whose indices are noted.
std::vector<held_block> held_blocks(const ggml_ext_kv_pages & pages, uint32_t list, const ggml_ext_kv_eviction & rule,
                                    std::vector<uint32_t> & index) {
    std::vector<held_block> blocks;
    for (const int32_t block : pages.blocks_of(list)) {
        index[block] = uint32_t(blocks.size());
        blocks.push_back({ block });
    }
    for (uint32_t lane = 0; lane < pages.n_lanes(); ++lane) {
        const std::vector<ggml_ext_kv_entry> & runs = pages.list(lane, list);
        if (runs.empty()) {
            continue;
        }
        const llama_pos recent =
            pages.positions(runs.back().block)[runs.back().begin + runs.back().count - 1] + 1 - llama_pos(rule.recent);
        for (const ggml_ext_kv_entry & run : runs) {
            held_block &    block  = blocks[index[run.block]];
            const int32_t * begin  = pages.positions(run.block) + run.begin;
            const int32_t * end    = begin + run.count;
            const uint32_t  n_sink = uint32_t(std::lower_bound(begin, end, llama_pos(rule.sink)) - begin);
            const uint32_t  n_old  = uint32_t(std::lower_bound(begin, end, recent) - begin);
            block.held |= bits_of(run.begin, run.count);
            block.needed |= bits_of(run.begin, n_sink) | bits_of(run.begin + n_old, run.count - n_old);
        }
    }
    return blocks;
}

using block_scores = std::array<float, slots_per_block>;

// Scores of the slots of a list's blocks, each the highest of its neighbours' in the lanes that hold it. Neighbours
// that nothing has looked at yet (+Inf) count for nothing.
std::vector<block_scores> pooled_scores(const held_slots & slots, const ggml_ext_kv_pages & pages, uint32_t list,
                                        const ggml_ext_kv_eviction & rule) {
    block_scores none;
    none.fill(-INFINITY);
    std::vector<block_scores> pooled(slots.lists[list].size(), none);
    std::vector<float>        row, seen;
    for (uint32_t lane = 0; lane < pages.n_lanes(); ++lane) {
        const std::vector<ggml_ext_kv_entry> & runs = pages.list(lane, list);
        row.clear();
        for (const ggml_ext_kv_entry & run : runs) {
            for (uint32_t i = run.begin; i < uint32_t(run.begin + run.count); ++i) {
                row.push_back(rule.score(list, run.block * int32_t(slots_per_block) + int32_t(i)));
            }
        }
        seen.assign(row.size() + 2 * rule.pool, -INFINITY);
        std::transform(row.begin(), row.end(), seen.begin() + rule.pool,
                       [](float score) { return score < INFINITY ? score : -INFINITY; });
        // Neighbour by neighbour, which compilers vectorise. A NaN stays one.
        for (uint32_t shift = 0; shift <= 2 * rule.pool; ++shift) {
            for (size_t i = 0; i < row.size(); ++i) {
                row[i] = std::max(row[i], seen[i + shift]);
            }
        }
        size_t i = 0;
        for (const ggml_ext_kv_entry & run : runs) {
            float * to = pooled[slots.index[run.block]].data() + run.begin;
            for (uint32_t j = 0; j < run.count; ++j, ++i) {
                to[j] = std::max(to[j], row[i]);
            }
        }
    }
    return pooled;
}

// The slots of a list that no lane needs.
std::vector<candidate> candidates_of(const held_slots & slots, const ggml_ext_kv_pages & pages, uint32_t list,
                                     const ggml_ext_kv_eviction & rule) {
    const std::vector<held_block> & blocks = slots.lists[list];
    std::vector<block_scores>       pooled;
    if (rule.pool > 0) {
        pooled = pooled_scores(slots, pages, list, rule);
    }
    std::vector<candidate> result;
    result.reserve(blocks.size() * slots_per_block);
    for (size_t b = 0; b < blocks.size(); ++b) {
        for (uint32_t i = 0; i < slots_per_block; ++i) {
            if ((blocks[b].held & ~blocks[b].needed) >> i & 1) {
                const int32_t slot     = blocks[b].block * int32_t(slots_per_block) + int32_t(i);
                const int32_t position = pages.positions(blocks[b].block)[i];
                const float   score    = rule.pool > 0 ? pooled[b][i] : rule.score(list, slot);
                // No order has NaN in it.
                result.push_back({ std::isnan(score) ? -INFINITY : score, position, slot, list });
            }
        }
    }
    return result;
}

uint32_t blocks_for(uint32_t n_slots) {
    return (n_slots + slots_per_block - 1) / slots_per_block;
}

// Of all lists' slots that may go, the lowest ones that make the blocks suffice are gone. False where none do.
bool choose(held_slots & slots, const ggml_ext_kv_pages & pages, uint32_t n_blocks, const ggml_ext_kv_eviction & rule) {
    const uint32_t            n_lists = pages.n_lists();
    const uint32_t            share = uint32_t(rule.floor * n_blocks / double(std::max(1u, n_lists))) * slots_per_block;
    const uint32_t            least = share - std::min(share, rule.incoming);
    // Heaps, since few of all go: of each list, and of the lowest one of each list that may still lose it.
    std::vector<lowest_first> candidates;
    lowest_first              next;
    std::vector<uint32_t>     n(n_lists);  // slots that stay
    uint64_t                  used  = 0;
    const auto                offer = [&](uint32_t list) {
        if (!candidates[list].empty() && n[list] > least) {
            next.push(candidates[list].top());
        }
    };
    for (uint32_t list = 0; list < n_lists; ++list) {
        candidates.emplace_back(std::greater<>(), candidates_of(slots, pages, list, rule));
        for (const held_block & block : slots.lists[list]) {
            n[list] += count_of(block.held);
        }
        used += blocks_for(n[list] + rule.incoming);
        offer(list);
    }
    while (used > n_blocks && !next.empty()) {
        const candidate lowest = next.top();
        const uint32_t  list   = lowest.list;
        const uint32_t  index  = slots.index[lowest.slot / int32_t(slots_per_block)];
        next.pop();
        slots.lists[list][index].gone |= bits_of(uint32_t(lowest.slot) % slots_per_block, 1);
        used -= blocks_for(n[list] + rule.incoming) - blocks_for(n[list] + rule.incoming - 1);
        n[list]--;
        candidates[list].pop();
        offer(list);
    }
    return used <= n_blocks;
}

void tell_lost(const std::vector<held_block> & blocks, const std::vector<uint32_t> & index,
               const ggml_ext_kv_pages & pages, uint32_t list, const ggml_ext_kv_eviction & rule) {
    for (uint32_t lane = 0; lane < pages.n_lanes(); ++lane) {
        for (const ggml_ext_kv_entry & run : pages.list(lane, list)) {
            const block_bits gone = blocks[index[run.block]].gone;
            for (uint32_t i = run.begin; i < uint32_t(run.begin + run.count); ++i) {
                if (gone >> i & 1) {
                    rule.lost(lane, pages.positions(run.block)[i]);
                }
            }
        }
    }
}

// What is not gone of a list comes to lie without gaps.
void pack(const std::vector<held_block> & blocks, ggml_ext_kv_pages & pages, uint32_t list,
          const ggml_ext_kv_eviction & rule) {
    std::vector<int32_t> order;
    std::vector<int32_t> target;
    int32_t              n = 0;
    for (const held_block & block : blocks) {
        order.push_back(block.block);
        for (uint32_t i = 0; i < slots_per_block; ++i) {
            target.push_back((block.held & ~block.gone) >> i & 1 ? n++ : -1);
        }
    }
    const auto slot_of = [&](size_t i) {
        return order[i / slots_per_block] * int32_t(slots_per_block) + int32_t(i % slots_per_block);
    };
    for (size_t i = 0, end = 0; i < target.size(); i = end) {
        end = i + 1;
        if (target[i] < 0 || target[i] == int32_t(i)) {
            continue;
        }
        while (end % slots_per_block != 0 && target[end] >= 0 && target[end] % int32_t(slots_per_block) != 0) {
            ++end;
        }
        rule.move(list, slot_of(i), slot_of(size_t(target[i])), uint32_t(end - i));
    }
    pages.pack(list, order, target);
}

}  // namespace

uint32_t ggml_ext_kv_needed(const ggml_ext_kv_pages & pages, const ggml_ext_kv_eviction & rule, uint32_t list) {
    std::vector<uint32_t> index(pages.n_blocks());
    uint32_t              n = 0;
    for (const held_block & block : held_blocks(pages, list, rule, index)) {
        n += count_of(block.needed);
    }
    return n;
}

std::vector<ggml_ext_kv_old_slot> ggml_ext_kv_old_slots(const ggml_ext_kv_pages & pages, uint32_t list,
                                                        const ggml_ext_kv_eviction & rule) {
    std::vector<uint32_t>             index(pages.n_blocks());
    const std::vector<held_block>     blocks = held_blocks(pages, list, rule, index);
    std::vector<uint32_t>             first(blocks.size());  // of a block's in `old`
    std::vector<ggml_ext_kv_old_slot> old;
    for (size_t b = 0; b < blocks.size(); ++b) {
        first[b] = uint32_t(old.size());
        for (uint32_t i = 0; i < slots_per_block; ++i) {
            if ((blocks[b].held & ~blocks[b].needed) >> i & 1) {
                old.push_back({ blocks[b].block * int32_t(slots_per_block) + int32_t(i),
                                pages.positions(blocks[b].block)[i],
                                {} });
            }
        }
    }
    for (uint32_t lane = 0; lane < pages.n_lanes(); ++lane) {
        for (const ggml_ext_kv_entry & run : pages.list(lane, list)) {
            const size_t     b      = index[run.block];
            const block_bits is_old = blocks[b].held & ~blocks[b].needed;
            const block_bits seen   = is_old & bits_of(run.begin, run.count);
            size_t           at     = first[b] + count_of(is_old & ~(~block_bits(0) << run.begin));
            for (uint32_t n = count_of(seen); n > 0; --n, ++at) {
                old[at].lanes.push_back(llama_seq_id(lane));
            }
        }
    }
    std::sort(old.begin(), old.end(), [](const ggml_ext_kv_old_slot & a, const ggml_ext_kv_old_slot & b) {
        return std::tie(a.position, a.slot) < std::tie(b.position, b.slot);
    });
    return old;
}

void ggml_ext_kv_drop(ggml_ext_kv_pages & pages, uint32_t list, const std::vector<int32_t> & slots,
                      const ggml_ext_kv_eviction & rule) {
    std::vector<uint32_t>   index(pages.n_blocks());
    std::vector<held_block> blocks = held_blocks(pages, list, rule, index);
    for (const int32_t slot : slots) {
        blocks[index[slot / int32_t(slots_per_block)]].gone |= bits_of(uint32_t(slot) % slots_per_block, 1);
    }
    pack(blocks, pages, list, rule);
}

bool ggml_ext_kv_evict(ggml_ext_kv_pages & pages, const ggml_ext_kv_eviction & rule, uint32_t wanted) {
    if (wanted <= pages.n_free() && rule.incoming == 0) {
        return true;
    }
    if (wanted > pages.n_blocks()) {
        return false;
    }
    held_slots slots;
    slots.index.resize(pages.n_blocks());
    for (uint32_t list = 0; list < pages.n_lists(); ++list) {
        slots.lists.push_back(held_blocks(pages, list, rule, slots.index));
    }
    if (!choose(slots, pages, pages.n_blocks() - wanted, rule)) {
        return false;
    }
    for (uint32_t list = 0; list < pages.n_lists(); ++list) {
        if (rule.lost) {
            tell_lost(slots.lists[list], slots.index, pages, list, rule);
        }
        // Also where nothing goes: blocks that are half empty after cuts are counted as packed.
        pack(slots.lists[list], pages, list, rule);
    }
    return true;
}
