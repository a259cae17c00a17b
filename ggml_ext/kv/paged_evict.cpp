// Which slots of a paged cache go where blocks are short, and how much room a ubatch is sure to find.

#include "evict.h"
#include "llama-batch.h"
#include "llama-impl.h"
#include "paged.h"

#include <algorithm>
#include <cstring>

static constexpr double   shared_floor = 0.25;  // where heads' scores say something of each other
static constexpr int32_t  score_window = 32;    // queries of a ubatch
static constexpr float    score_decay  = 0.5f;
static constexpr uint32_t score_pool   = 3;     // neighbours on each side
static constexpr uint32_t least_room   = 48;    // tokens to make room for: making it takes as long as some of them

float ggml_ext_kv_random(uint32_t list, llama_pos position) {
    uint64_t x = (uint64_t(list) << 32 | uint32_t(position)) + 0x9e3779b97f4a7c15;  // splitmix64
    x          = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x          = (x ^ x >> 27) * 0x94d049bb133111eb;
    return float((x ^ x >> 31) >> 40);
}

static uint64_t kv_blocks_for(uint64_t n_slots) {
    return (n_slots + GGML_EXT_KV_SLOTS - 1) / GGML_EXT_KV_SLOTS;
}

uint64_t ggml_ext_kv_paged::lone_blocks(uint32_t n_tokens) const {
    return kv_blocks_for(uint64_t(rule.sink) + rule.recent + std::max(n_tokens, least_room));
}

uint64_t ggml_ext_kv_paged::least_blocks(uint32_t n_ubatch) const {
    if (n_seq == 1) {
        return lone_blocks(n_ubatch);
    }
    // Each sequence of a ubatch opens a block of its own.
    return staying_blocks() + std::min(n_seq, n_ubatch) - 1 + kv_blocks_for(n_ubatch);
}

uint64_t ggml_ext_kv_paged::staying_blocks() const {
    return kv_blocks_for(n_seq * (uint64_t(rule.sink) + rule.recent));
}

float * ggml_ext_kv_paged::score(const layer & layer, int32_t slot, bool cold) const {
    if (cold) {
        return codes->score(layer.index, slot);
    }
    return reinterpret_cast<float *>(rows.block_of(slot) + block_of(layer).score) + slot % GGML_EXT_KV_SLOTS;
}

void ggml_ext_kv_paged::move(uint32_t list, int32_t from, int32_t to, uint32_t n) const {
    const layer & layer = layers[layer_of[list]];
    for (const bool v : { false, true }) {
        std::memmove(row(layer, v, to), row(layer, v, from), n * row_size(layer, v));
    }
    if (scored()) {
        std::memmove(score(layer, to), score(layer, from), n * sizeof(float));
    }
    std::memmove(held.positions(to / GGML_EXT_KV_SLOTS) + to % GGML_EXT_KV_SLOTS,
                 held.positions(from / GGML_EXT_KV_SLOTS) + from % GGML_EXT_KV_SLOTS, n * sizeof(int32_t));
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
        const uint64_t whole = kv_blocks_for(n[lane]) * lists;
        sum += n[lane] > 0 && with_room ? held.n_needed(lane, n[lane]) : whole;
    }
    return sum;
}

// Blocks that stay whatever a ubatch of a batch evicts, behind `before` tokens of the batch: the budget's bound for
// as many sequences as the context was made for, which copies may outnumber; else what is needed now, and those tokens.
uint64_t ggml_ext_kv_paged::staying_blocks(const std::vector<bool> & used, uint64_t before) const {
    if (uint64_t(std::count(used.begin(), used.end(), true)) <= n_seq) {
        return staying_blocks() * lists;
    }
    uint64_t sum = 0;
    for (uint32_t list = 0; list < lists; ++list) {
        sum += kv_blocks_for(ggml_ext_kv_needed(held, keeps(), list) + before);
    }
    return sum;
}

bool ggml_ext_kv_paged::holds(llama_seq_id s) const {
    for (uint32_t list = 0; list < lists; ++list) {
        if (!held.list(uint32_t(s), list).empty() || (codes && !codes->pages.list(uint32_t(s), list).empty())) {
            return true;
        }
    }
    return false;
}

bool ggml_ext_kv_paged::can_fit(const std::vector<llama_ubatch> & ubatches) const {
    if (lists == 0) {
        return true;  // no layer with attention
    }
    std::vector<bool> used(LLAMA_MAX_SEQ);
    for (llama_seq_id lane = 0; lane < LLAMA_MAX_SEQ; ++lane) {
        used[lane] = holds(lane);
    }
    uint64_t before = 0;
    for (const llama_ubatch & ubatch : ubatches) {
        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            for (int32_t j = 0; j < ubatch.n_seq_id[i]; ++j) {
                used[ubatch.seq_id[i][j]] = true;
            }
        }
        const bool     lone  = std::count(used.begin(), used.end(), true) == 1;
        const uint64_t stays = lone ? 0 : staying_blocks(used, before);
        const uint64_t takes = lone ? lone_blocks(ubatch.n_tokens) * lists : most_blocks(ubatch, false);
        if (takes + stays > held.n_blocks()) {
            LLAMA_LOG_ERROR("%s: ggml-ext: a ubatch of %u tokens takes up to %llu blocks beside the %llu that stay, of "
                            "%u; raise the budget or lower -ub\n",
                            __func__, ubatch.n_tokens, (unsigned long long) takes, (unsigned long long) stays,
                            held.n_blocks());
            return false;
        }
        before += ubatch.n_tokens;
    }
    return true;
}

// KV-Compress (arXiv 2410.00161, section 3) takes the queries of a window too. What they look at is compared with half of what
// earlier ones did; docs/kv-cache.md has the figures.
ggml_ext_kv_score_params ggml_ext_kv_paged::scoring() const {
    ggml_ext_kv_score_params p = {};
    p.window                   = score_window;
    p.recent                   = int32_t(rule.recent);
    p.decay                    = score_decay;
    return p;
}

bool ggml_ext_kv_paged::scores_by(int64_t n_tokens) {
    return n_tokens * 4 >= score_window;
}

ggml_ext_kv_eviction ggml_ext_kv_paged::keeps() const {
    ggml_ext_kv_eviction how = {};
    how.sink                 = rule.sink;
    how.recent               = rule.recent;
    return how;
}

// As rows are evicted.
ggml_ext_kv_eviction ggml_ext_kv_paged::eviction() const {
    ggml_ext_kv_eviction how = keeps();
    // Norms of different heads say nothing of each other; probes' scores and probabilities do.
    how.floor                = policy() == ggml_ext_kv_policy::probe || attended() ? shared_floor : 1.0;
    how.pool                 = attended() ? score_pool : 0;
    how.score                = [this](uint32_t list, int32_t slot) {
        return scored() ? *score(layers[layer_of[list]], slot) :
                                         ggml_ext_kv_random(list, held.positions(slot / GGML_EXT_KV_SLOTS)[slot % GGML_EXT_KV_SLOTS]);
    };
    how.move = [this](uint32_t list, int32_t from, int32_t to, uint32_t n) { move(list, from, to, n); };
    return how;
}

// Whether a ubatch's tokens and all tokens in the pages are of one sequence.
bool ggml_ext_kv_paged::is_lone(const llama_ubatch & ubatch) const {
    const llama_seq_id lone = ubatch.seq_id[0][0];
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        if (ubatch.n_seq_id[i] != 1 || ubatch.seq_id[i][0] != lone) {
            return false;
        }
    }
    for (llama_seq_id lane = 0; lane < LLAMA_MAX_SEQ; ++lane) {
        if (lane != lone && holds(lane)) {
            return false;
        }
    }
    return true;
}

bool ggml_ext_kv_paged::make_room(const llama_ubatch & ubatch) {
    const bool lone = is_lone(ubatch);
    if (codes) {
        return cool(lone) && most_blocks(ubatch, true) <= held.n_free();
    }
    return lone ? make_room(0, std::max(ubatch.n_tokens, least_room)) : make_room(most_blocks(ubatch, false), 0);
}

bool ggml_ext_kv_paged::make_room(uint64_t wanted, uint32_t incoming) {
    if (codes) {
        return cool(false) && wanted <= held.n_free();
    }
    ggml_ext_kv_eviction how = eviction();
    if (attended()) {
        how.lost = [this](uint32_t lane, llama_pos position) { boundary[lane] = std::max(boundary[lane], position); };
    }
    for (uint32_t lane = 0; lane < LLAMA_MAX_SEQ; ++lane) {
        prefixes.cut(lane, 0);  // blocks are no longer whole
    }
    how.incoming = incoming;
    return wanted <= held.n_blocks() && ggml_ext_kv_evict(held, how, uint32_t(wanted));
}
