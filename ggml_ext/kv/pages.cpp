#include "pages.h"

#include <algorithm>
#include <cassert>
#include <map>
#include <unordered_map>

static constexpr uint32_t kv_slots = GGML_EXT_KV_SLOTS;

ggml_ext_kv_pages::ggml_ext_kv_pages(uint32_t n_lanes, uint32_t n_lists, uint32_t n_blocks) :
    lists_per_lane(n_lists), lists(size_t(n_lanes) * n_lists), blocks(n_blocks), free_blocks(n_blocks) {
    for (uint32_t i = 0; i < n_blocks; ++i) {
        free_blocks[i] = int32_t(n_blocks - 1 - i);
    }
}

void ggml_ext_kv_pages::keep_positions(int32_t * first, size_t stride) {
    first_position  = first;
    position_stride = stride;
}

int32_t ggml_ext_kv_pages::take_block() {
    if (free_blocks.empty()) {
        return -1;
    }
    const int32_t block = free_blocks.back();
    free_blocks.pop_back();
    blocks[block].fill = 0;
    return block;
}

void ggml_ext_kv_pages::release(int32_t block) {
    assert(blocks[block].references > 0);
    if (--blocks[block].references == 0) {
        blocks[block].generation++;
        free_blocks.push_back(block);
    }
}

// Slots behind a run that its lane may still fill.
uint32_t ggml_ext_kv_pages::room(const ggml_ext_kv_entry & last) const {
    const uint32_t end = last.begin + last.count;
    const state &  s   = blocks[last.block];
    return s.references == 1 || s.fill == end ? kv_slots - end : 0;
}

bool ggml_ext_kv_pages::holds_behind(uint32_t lane, uint32_t i, llama_pos position) const {
    const std::vector<ggml_ext_kv_entry> & list = this->list(lane, i);
    return !list.empty() && last_of(list.back()) > position;
}

uint64_t ggml_ext_kv_pages::n_needed(uint32_t lane, uint32_t n) const {
    uint64_t sum = 0;
    for (uint32_t i = 0; i < lists_per_lane; ++i) {
        const std::vector<ggml_ext_kv_entry> & list = this->list(lane, i);
        // Of a shared block another lane may take the room first.
        const uint32_t free = list.empty() || blocks[list.back().block].references > 1 ? 0 : room(list.back());
        sum += n > free ? (n - free + kv_slots - 1) / kv_slots : 0;
    }
    return sum;
}

void ggml_ext_kv_pages::show(uint32_t lane, uint32_t i, int32_t block, uint32_t slot) {
    std::vector<ggml_ext_kv_entry> & list = runs(lane, i);
    if (!list.empty() && list.back().block == block && list.back().begin + list.back().count == int(slot)) {
        list.back().count++;
    } else {
        list.push_back({ block, uint16_t(slot), 1 });
        blocks[block].references++;
    }
    blocks[block].fill = std::max(blocks[block].fill, slot + 1);
}

// A slot behind a run, or of a fresh block; -1: no block is free. last may be null.
int32_t ggml_ext_kv_pages::next_slot(const ggml_ext_kv_entry * last) {
    const bool     fits  = last && room(*last) > 0;
    const int32_t  block = fits ? last->block : take_block();
    const uint32_t slot  = fits ? last->begin + last->count : 0;
    if (block < 0) {
        return -1;
    }
    blocks[block].generation += slot < blocks[block].fill;
    blocks[block].fill = slot;  // what its only lane gave up behind it can be written again
    return int32_t(block * kv_slots + slot);
}

bool ggml_ext_kv_pages::append(const llama_seq_id * lanes, uint32_t n_lanes, llama_pos position, int32_t * slots) {
    for (uint32_t i = 0; i < lists_per_lane; ++i) {
        const std::vector<ggml_ext_kv_entry> & own = list(lanes[0], i);
        slots[i]                                   = next_slot(own.empty() ? nullptr : &own.back());
        if (slots[i] < 0) {
            return false;
        }
        const int32_t  block = slots[i] / int32_t(kv_slots);
        const uint32_t slot  = uint32_t(slots[i]) % kv_slots;
        for (uint32_t l = 0; l < n_lanes; ++l) {
            show(lanes[l], i, block, slot);
        }
        if (first_position) {
            positions(block)[slot] = position;
        }
    }
    return true;
}

// A run of one slot among a list's, one of which may end in front of it and go on behind.
void ggml_ext_kv_pages::place(uint32_t lane, uint32_t i, llama_pos position, int32_t slot) {
    std::vector<ggml_ext_kv_entry> & list  = runs(lane, i);
    const ggml_ext_kv_entry          added = { slot / int32_t(kv_slots), uint16_t(slot % int32_t(kv_slots)), 1 };
    auto                             at    = std::partition_point(list.begin(), list.end(),
                                                                  [&](const ggml_ext_kv_entry & e) { return first_of(e) < position; });
    if (at != list.begin() && last_of(*(at - 1)) > position) {
        const ggml_ext_kv_entry cut    = *(at - 1);
        const ggml_ext_kv_entry behind = part(cut, position, INT32_MAX);
        *(at - 1)                      = part(cut, -1, position);
        at                             = list.insert(at, behind);
        blocks[behind.block].references++;
    }
    list.insert(at, added);
    state & block = blocks[added.block];
    block.references++;
    block.fill = std::max(block.fill, uint32_t(added.begin) + 1);
}

int32_t ggml_ext_kv_pages::insert(uint32_t i, const std::vector<llama_seq_id> & lanes, llama_pos position) {
    // Behind the token in front of it, so that tokens that come in their order share a block wherever they come.
    const std::vector<ggml_ext_kv_entry> & first  = list(lanes[0], i);
    const auto                             behind = std::partition_point(first.begin(), first.end(),
                                                                         [&](const ggml_ext_kv_entry & e) { return last_of(e) < position; });
    const int32_t                          slot   = next_slot(behind == first.begin() ? nullptr : &*(behind - 1));
    if (slot < 0) {
        return -1;
    }
    const int32_t block                        = slot / int32_t(kv_slots);
    positions(block)[slot % int32_t(kv_slots)] = position;
    for (const llama_seq_id lane : lanes) {
        const std::vector<ggml_ext_kv_entry> & own = list(lane, i);
        if (own.empty() || last_of(own.back()) < position) {
            show(lane, i, block, uint32_t(slot) % kv_slots);
        } else {
            place(lane, i, position, slot);
        }
    }
    return slot;
}

ggml_ext_kv_entry ggml_ext_kv_pages::part(const ggml_ext_kv_entry & entry, llama_pos p0, llama_pos p1) const {
    const int32_t * begin = positions(entry.block) + entry.begin;
    const int32_t * end   = begin + entry.count;
    const int32_t * from  = std::lower_bound(begin, end, p0);
    const int32_t * to    = std::lower_bound(from, end, p1);
    return { entry.block, uint16_t(entry.begin + (from - begin)), uint16_t(to - from) };
}

void ggml_ext_kv_pages::remove(uint32_t lane, llama_pos p0, llama_pos p1) {
    for (uint32_t i = 0; i < lists_per_lane && p0 < p1; ++i) {
        std::vector<ggml_ext_kv_entry> &     list  = runs(lane, i);
        const auto                           first = std::partition_point(list.begin(), list.end(),
                                                                          [&](const ggml_ext_kv_entry & e) { return last_of(e) < p0; });
        const std::vector<ggml_ext_kv_entry> rest(first, list.end());
        list.erase(first, list.end());
        for (const ggml_ext_kv_entry & entry : rest) {
            for (const ggml_ext_kv_entry & kept : { part(entry, -1, p0), part(entry, p1, INT32_MAX) }) {
                if (kept.count > 0) {
                    list.push_back(kept);
                    blocks[kept.block].references++;
                }
            }
            release(entry.block);
        }
    }
}

std::map<llama_pos, int32_t> ggml_ext_kv_pages::slots_of(uint32_t lane, uint32_t i, llama_pos p0, llama_pos p1) const {
    std::map<llama_pos, int32_t> slots;
    for (const ggml_ext_kv_entry & entry : list(lane, i)) {
        const ggml_ext_kv_entry held = part(entry, p0, p1);
        for (uint32_t slot = held.begin; slot < uint32_t(held.begin + held.count); ++slot) {
            slots[positions(held.block)[slot]] = int32_t(held.block * kv_slots + slot);
        }
    }
    return slots;
}

// A list's positions with those that `from` has among p0 .. p1 - 1. False where both have one in different slots.
bool ggml_ext_kv_pages::join(uint32_t from, uint32_t to, uint32_t i, llama_pos p0, llama_pos p1,
                             std::vector<ggml_ext_kv_entry> & joined) const {
    std::map<llama_pos, int32_t> slots = slots_of(to, i, 0, INT32_MAX);
    for (const auto & [position, slot] : slots_of(from, i, p0, p1)) {
        if (slots.emplace(position, slot).first->second != slot) {
            return false;
        }
    }
    joined.clear();
    for (const auto & [position, slot] : slots) {
        const int32_t  block = slot / int32_t(kv_slots);
        const uint32_t place = uint32_t(slot) % kv_slots;
        if (!joined.empty() && joined.back().block == block &&
            joined.back().begin + joined.back().count == int(place)) {
            joined.back().count++;
        } else {
            joined.push_back({ block, uint16_t(place), 1 });
        }
    }
    return true;
}

bool ggml_ext_kv_pages::share(uint32_t from, uint32_t to, llama_pos p0, llama_pos p1) {
    std::vector<std::vector<ggml_ext_kv_entry>> merged(lists_per_lane);
    for (uint32_t i = 0; i < lists_per_lane; ++i) {
        merged[i] = list(to, i);
        for (const ggml_ext_kv_entry & entry : list(from, i)) {
            const ggml_ext_kv_entry shared = part(entry, p0, p1);
            if (shared.count > 0) {
                merged[i].push_back(shared);
            }
        }
        const auto before = [&](const ggml_ext_kv_entry & a, const ggml_ext_kv_entry & b) {
            return first_of(a) < first_of(b);
        };
        std::sort(merged[i].begin(), merged[i].end(), before);
        const auto meets = [&](const ggml_ext_kv_entry & a, const ggml_ext_kv_entry & b) {
            return last_of(a) >= first_of(b);
        };
        const bool apart = std::adjacent_find(merged[i].begin(), merged[i].end(), meets) == merged[i].end();
        if (!apart && !join(from, to, i, p0, p1, merged[i])) {
            return false;
        }
    }
    for (uint32_t i = 0; i < lists_per_lane; ++i) {
        for (const ggml_ext_kv_entry & entry : merged[i]) {
            blocks[entry.block].references++;
        }
        for (const ggml_ext_kv_entry & entry : list(to, i)) {
            release(entry.block);
        }
        runs(to, i) = std::move(merged[i]);
    }
    return true;
}

bool ggml_ext_kv_pages::meets(uint32_t lane, const ggml_ext_kv_pages & other, uint32_t other_lane, uint32_t i,
                              llama_pos p0, llama_pos p1) const {
    const std::map<llama_pos, int32_t> theirs = other.slots_of(other_lane, i, p0, p1);
    for (const auto & [position, slot] : slots_of(lane, i, p0, p1)) {
        if (theirs.count(position) > 0) {
            return true;
        }
    }
    return false;
}

void ggml_ext_kv_pages::clear(uint32_t lane) {
    for (uint32_t i = 0; i < lists_per_lane; ++i) {
        for (const ggml_ext_kv_entry & entry : list(lane, i)) {
            release(entry.block);
        }
        runs(lane, i).clear();
    }
}

bool ggml_ext_kv_pages::is_whole(uint32_t lane, uint32_t i, size_t run) const {
    const std::vector<ggml_ext_kv_entry> & list = this->list(lane, i);
    return run < list.size() && list[run].begin == 0 && list[run].count == kv_slots &&
           first_of(list[run]) == llama_pos(run * kv_slots);
}

void ggml_ext_kv_pages::replace(uint32_t lane, uint32_t i, size_t run, int32_t block) {
    ggml_ext_kv_entry & entry = runs(lane, i)[run];
    blocks[block].references++;
    release(entry.block);
    entry.block = block;
}

std::vector<int32_t> ggml_ext_kv_pages::blocks_of(uint32_t i) const {
    std::vector<int32_t> order;
    std::vector<bool>    seen(blocks.size());
    for (uint32_t lane = 0; lane < n_lanes(); ++lane) {
        for (const ggml_ext_kv_entry & entry : list(lane, i)) {
            if (!seen[entry.block]) {
                order.push_back(entry.block);
                seen[entry.block] = true;
            }
        }
    }
    return order;
}

void ggml_ext_kv_pages::pack(uint32_t i, const std::vector<int32_t> & order, const std::vector<int32_t> & target) {
    std::unordered_map<int32_t, uint32_t> index;
    for (uint32_t b = 0; b < order.size(); ++b) {
        index[order[b]] = b;
        blocks[order[b]].references++;  // while runs change
    }
    for (uint32_t lane = 0; lane < n_lanes(); ++lane) {
        const std::vector<ggml_ext_kv_entry> before = std::move(runs(lane, i));
        runs(lane, i).clear();
        for (const ggml_ext_kv_entry & entry : before) {
            const int32_t * targets = &target[index[entry.block] * kv_slots];
            for (uint32_t slot = entry.begin; slot < uint32_t(entry.begin + entry.count); ++slot) {
                const int32_t to = targets[slot];
                if (to >= 0) {
                    show(lane, i, order[to / int32_t(kv_slots)], uint32_t(to) % kv_slots);
                }
            }
            release(entry.block);
        }
    }
    const int32_t n = int32_t(std::count_if(target.begin(), target.end(), [](int32_t to) { return to >= 0; }));
    for (uint32_t b = 0; b < order.size(); ++b) {
        state & block = blocks[order[b]];
        block.fill    = uint32_t(std::clamp(n - int32_t(b * kv_slots), 0, int32_t(kv_slots)));
        block.generation++;
        release(order[b]);
    }
}
