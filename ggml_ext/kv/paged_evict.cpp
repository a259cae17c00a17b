// Which slots of a paged cache go where blocks are short, and how much room a ubatch is sure to find.

#include "evict.h"
#include "llama-batch.h"
#include "llama-impl.h"
#include "paged.h"

#include <algorithm>
#include <cstring>

static constexpr double probe_floor = 0.25;

// Any order, the same for equal runs.
static float kv_random(uint32_t list, llama_pos position) {
    uint64_t x = (uint64_t(list) << 32 | uint32_t(position)) + 0x9e3779b97f4a7c15;  // splitmix64
    x          = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x          = (x ^ x >> 27) * 0x94d049bb133111eb;
    return float((x ^ x >> 31) >> 40);
}

uint64_t ggml_ext_kv_paged::least_blocks() const {
    return (n_seq * (uint64_t(rule.sink) + rule.recent) + GGML_EXT_KV_SLOTS - 1) / GGML_EXT_KV_SLOTS;
}

float * ggml_ext_kv_paged::score(const layer & layer, int32_t slot) const {
    char * block = static_cast<char *>(blocks->data) + size_t(slot / GGML_EXT_KV_SLOTS) * block_size;
    return reinterpret_cast<float *>(block + block_of(layer).score) + slot % GGML_EXT_KV_SLOTS;
}

void ggml_ext_kv_paged::move(uint32_t list, int32_t from, int32_t to) const {
    const layer & layer = layers[layer_of[list]];
    for (const bool v : { false, true }) {
        std::memcpy(row(layer, v, to), row(layer, v, from), row_size(layer, v));
    }
    if (scored()) {
        *score(layer, to) = *score(layer, from);
    }
    held.positions(to / GGML_EXT_KV_SLOTS)[to % GGML_EXT_KV_SLOTS] =
        held.positions(from / GGML_EXT_KV_SLOTS)[from % GGML_EXT_KV_SLOTS];
}

// A bound of the blocks that a ubatch takes: with the room of open blocks as it is, or without any. Where tokens of
// several sequences meet others, each sequence may go its own way, which opens a block.
uint64_t ggml_ext_kv_paged::most_blocks(const llama_ubatch & ubatch, bool with_room) const {
    std::vector<uint32_t> n(LLAMA_MAX_SEQ);
    uint64_t              sum = 0;
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        n[ubatch.seq_id[i][0]]++;
        const int32_t now = ubatch.n_seq_id[i], before = i > 0 ? ubatch.n_seq_id[i - 1] : 0;
        if ((now > 1 || before > 1) &&
            (now != before || !std::equal(ubatch.seq_id[i], ubatch.seq_id[i] + now, ubatch.seq_id[i - 1]))) {
            sum += uint64_t(now + before) * lists;
        }
    }
    for (uint32_t lane = 0; lane < LLAMA_MAX_SEQ; ++lane) {
        const uint64_t whole = uint64_t((n[lane] + GGML_EXT_KV_SLOTS - 1) / GGML_EXT_KV_SLOTS) * lists;
        sum += n[lane] > 0 && with_room ? held.n_needed(lane, n[lane]) : whole;
    }
    return sum;
}

bool ggml_ext_kv_paged::can_fit(const llama_ubatch & ubatch) const {
    const uint64_t stays = least_blocks() * lists;
    if (most_blocks(ubatch, false) + stays <= held.n_blocks()) {
        return true;
    }
    LLAMA_LOG_ERROR("%s: ggml-ext: a ubatch of %u tokens takes up to %llu blocks beside the %llu that stay, of %u; "
                    "raise the budget or lower -ub\n",
                    __func__, ubatch.n_tokens, (unsigned long long) most_blocks(ubatch, false),
                    (unsigned long long) stays, held.n_blocks());
    return false;
}

bool ggml_ext_kv_paged::make_room(uint64_t wanted) {
    ggml_ext_kv_eviction how;
    how.sink   = rule.sink;
    how.recent = rule.recent;
    // Norms of different heads say nothing of each other; probes' scores do.
    how.floor  = policy() == ggml_ext_kv_policy::probe ? probe_floor : 1.0;
    how.score  = [this](uint32_t list, int32_t slot) {
        return scored() ? *score(layers[layer_of[list]], slot) :
                           kv_random(list, held.positions(slot / GGML_EXT_KV_SLOTS)[slot % GGML_EXT_KV_SLOTS]);
    };
    how.move = [this](uint32_t list, int32_t from, int32_t to) { move(list, from, to); };
    for (uint32_t lane = 0; lane < LLAMA_MAX_SEQ; ++lane) {
        prefixes.cut(lane, 0);  // blocks are no longer whole
    }
    return wanted <= held.n_blocks() && ggml_ext_kv_evict(held, how, uint32_t(wanted));
}
