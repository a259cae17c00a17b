// Old tokens of a paged cache become codes: when, and where they go. Rows are short of blocks as with eviction, and what
// no sequence needs in them is not forgotten but coded, slot by slot, in the order of positions.

#include "evict.h"
#include "llama-batch.h"
#include "llama-impl.h"
#include "paged.h"

#include <algorithm>
#include <map>
#include <set>

namespace {

uint64_t cold_blocks_for(uint64_t n) {
    return (n + GGML_EXT_KV_SLOTS - 1) / GGML_EXT_KV_SLOTS;
}

// Slots that a list holds.
uint64_t n_held(const ggml_ext_kv_pages & pages, uint32_t list) {
    std::map<int32_t, uint64_t> bits;
    uint64_t                    n = 0;
    for (uint32_t lane = 0; lane < pages.n_lanes(); ++lane) {
        for (const ggml_ext_kv_entry & run : pages.list(lane, list)) {
            const uint64_t ones = run.count == GGML_EXT_KV_SLOTS ? ~uint64_t(0) : (uint64_t(1) << run.count) - 1;
            uint64_t &     held = bits[run.block];
            const uint64_t now  = held | ones << run.begin;
            n += uint64_t(__builtin_popcountll(now ^ held));
            held = now;
        }
    }
    return n;
}

}  // namespace

// Sequences that leave tokens in a list of codes leave a block open each, and packing one more.
static uint64_t kv_open_blocks(const std::set<llama_seq_id> & lanes) {
    return lanes.size() + 1;
}

// Whether there is room for all that is held, and a batch, as codes: what has become a code stays one.
bool ggml_ext_kv_paged::has_cold_room(const std::vector<llama_ubatch> & ubatches) const {
    if (!codes || evicts() || lists == 0) {
        return true;
    }
    std::set<llama_seq_id> used;
    uint64_t               n = 0;
    for (const llama_ubatch & ubatch : ubatches) {
        n += ubatch.n_tokens;
        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            used.insert(ubatch.seq_id[i], ubatch.seq_id[i] + ubatch.n_seq_id[i]);
        }
    }
    for (llama_seq_id lane = 0; lane < LLAMA_MAX_SEQ; ++lane) {
        if (!held.list(uint32_t(lane), 0).empty() || !codes->pages.list(uint32_t(lane), 0).empty()) {
            used.insert(lane);
        }
    }
    // Nothing is evicted, so all lists hold the same tokens.
    const uint64_t most = cold_blocks_for(n_held(held, 0) + n_held(codes->pages, 0) + n) + kv_open_blocks(used);
    if (most * lists <= codes->pages.n_blocks()) {
        return true;
    }
    LLAMA_LOG_ERROR("%s: ggml-ext: a batch of %llu tokens takes up to %llu blocks of codes for each head, of %u; raise "
                    "the budget\n",
                    __func__, (unsigned long long) n, (unsigned long long) most, codes->pages.n_blocks() / lists);
    return false;
}

bool ggml_ext_kv_paged::make_cold_room(uint64_t wanted, uint32_t incoming) {
    if (incoming == 0 && wanted <= codes->pages.n_free()) {
        return true;
    }
    ggml_ext_kv_eviction how = eviction();
    how.incoming             = incoming;
    how.sink                 = 0;
    how.recent               = evicts() ? 0 : INT32_MAX;  // nothing goes, and what is there is packed
    how.score                = [this](uint32_t list, int32_t slot) {
        const uint32_t layer = layer_of[list];
        return scored() ?
                                  *codes->score(layer, slot) :
                                  ggml_ext_kv_random(list, codes->pages.positions(
                                                slot / int32_t(GGML_EXT_KV_SLOTS))[slot % int32_t(GGML_EXT_KV_SLOTS)]);
    };
    how.move = [this](uint32_t list, int32_t from, int32_t to, uint32_t n) {
        for (uint32_t i = 0; i < n; ++i) {
            codes->move_slot(layer_of[list], from + int32_t(i), to + int32_t(i));
        }
    };
    return wanted <= codes->pages.n_blocks() && ggml_ext_kv_evict(codes->pages, how, uint32_t(wanted));
}

// Room for what is old, [list]. Of a lone sequence, whose codes all lie in front of it, open blocks' room counts.
bool ggml_ext_kv_paged::make_cold_room(const std::vector<std::vector<ggml_ext_kv_old_slot>> & old, bool lone) {
    uint64_t wanted = 0;
    size_t   most   = 0;
    for (uint32_t list = 0; list < lists; ++list) {
        if (old[list].empty()) {
            continue;
        }
        std::set<llama_seq_id> first;
        for (const ggml_ext_kv_old_slot & slot : old[list]) {
            first.insert(slot.lanes[0]);
        }
        wanted += cold_blocks_for(old[list].size()) + kv_open_blocks(first) - 1;
        most = std::max(most, old[list].size());
        lone = lone && !codes->pages.holds_behind(uint32_t(*first.begin()), list, old[list][0].position);
    }
    if (!lone || most == 0) {
        return make_cold_room(wanted, 0);
    }
    const uint32_t lane = uint32_t(old[0][0].lanes[0]);
    return codes->pages.n_needed(lane, uint32_t(most)) <= codes->pages.n_free() || make_cold_room(0, uint32_t(most));
}

// Codes what no sequence needs as rows, and packs what is left of them.
bool ggml_ext_kv_paged::cool(bool lone) {
    const ggml_ext_kv_eviction                     how = eviction();
    std::vector<std::vector<ggml_ext_kv_old_slot>> old;
    for (uint32_t list = 0; list < lists; ++list) {
        old.push_back(ggml_ext_kv_old_slots(held, list, how));
    }
    if (!make_cold_room(old, lone)) {
        return false;
    }
    std::vector<std::vector<ggml_ext_kv_cold_pool::move>> moves(n_layers());
    for (uint32_t list = 0; list < lists; ++list) {
        const layer & layer = layers[layer_of[list]];
        for (const ggml_ext_kv_old_slot & slot : old[list]) {
            const int32_t to = codes->pages.insert(list, slot.lanes, slot.position);
            GGML_ASSERT(to >= 0 && "ggml-ext: a paged KV cache has no block for codes that it made room for");
            moves[layer.index].push_back({ slot.slot, to, int32_t(list - layer.first_list) });
        }
    }
    codes->encode(rows.tensor(), moves);
    for (uint32_t list = 0; list < lists; ++list) {
        std::vector<int32_t> gone;
        for (const ggml_ext_kv_old_slot & slot : old[list]) {
            gone.push_back(slot.slot);
        }
        ggml_ext_kv_drop(held, list, gone, how);
    }
    return true;
}
