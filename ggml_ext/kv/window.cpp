// Which positions sequences keep under policy "window", and what that means for cutting them.

#include "budget.h"
#include "hooks.h"
#include "llama-batch.h"
#include "llama-kv-cache.h"
#include "llama-kv-cells.h"

#include <algorithm>

// A stream of n cells holds a sequences, and gets u tokens of the ubatch: each sequence keeps its sinks and its latest
// (n - u) / a - sink positions, so that all of it fits.
ggml_ext_kv_spent::ggml_ext_kv_spent(const ggml_ext_kv * ext, const llama_kv_cells & cells,
                                     const llama_ubatch & ubatch) {
    if (!ext || ext->paged) {
        return;
    }
    sink                   = ext->sink;
    const bool     streams = ext->n_seq == 1;
    const uint32_t tokens  = streams ? ubatch.n_tokens / std::max(1u, ubatch.n_seqs_unq) : ubatch.n_tokens;

    std::vector<bool> lives(LLAMA_MAX_SEQ, false);
    for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ; ++s) {
        lives[s] = cells.seq_pos_max(s) >= 0;
    }
    for (uint32_t i = 0; i < ubatch.n_seqs_unq && !streams; ++i) {
        lives[ubatch.seq_id_unq[i]] = true;
    }
    const int64_t count = std::max<int64_t>(1, std::count(lives.begin(), lives.end(), true));
    const int64_t keeps = std::max<int64_t>(ext->recent, (int64_t(cells.size()) - tokens) / count - sink);

    first.assign(LLAMA_MAX_SEQ, 0);
    for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ; ++s) {
        first[s] = llama_pos(std::max<int64_t>(0, cells.seq_pos_max(s) + 1 - keeps));
    }
}

bool ggml_ext_kv_spent::operator()(const llama_kv_cells & cells, uint32_t cell) const {
    if (first.empty() || cells.is_empty(cell) || cells.seq_count(cell) != 1) {
        return false;
    }
    const llama_pos position = cells.pos_get(cell);
    return position >= sink && position < first_kept(cells.seq_get(cell));
}

llama_pos ggml_ext_kv_spent::first_kept(llama_seq_id s) const {
    return first.empty() ? 0 : first[s];
}

void ggml_ext_kv_begin(llama_kv_cache & cache, const llama_ubatch & ubatch,
                       const std::vector<std::vector<uint32_t>> & token_cells) {
    ggml_ext_kv & ext = *cache.ext;
    if (ext.paged) {
        std::vector<uint32_t> all;
        for (const std::vector<uint32_t> & stream : token_cells) {
            all.insert(all.end(), stream.begin(), stream.end());
        }
        ext.paged->begin(ubatch, all);
        return;
    }
    ext.evicts = true;
    for (llama_seq_id s = 0; s < llama_seq_id(ext.cells->size() * ext.n_seq); ++s) {
        const ggml_ext_kv_spent spent(&ext, (*ext.cells)[ext.n_seq == 1 ? s : 0], ubatch);
        if (spent.first_kept(s) > ext.sink) {
            cache.seq_rm(s, ext.sink, spent.first_kept(s));
        }
    }
    ext.evicts = false;
}

// A sequence's positions, rising.
static std::vector<llama_pos> kv_positions(const llama_kv_cells & cells, llama_seq_id s) {
    std::vector<llama_pos> positions;
    for (uint32_t i = 0; i < cells.size(); ++i) {
        if (!cells.is_empty(i) && cells.seq_has(i, s)) {
            positions.push_back(cells.pos_get(i));
        }
    }
    std::sort(positions.begin(), positions.end());
    return positions;
}

// The first position of the contiguous run at the end of a sequence's positions, which are not empty.
static llama_pos kv_end_run(const std::vector<llama_pos> & positions) {
    llama_pos begin = positions.back();
    for (auto it = positions.rbegin(); it != positions.rend() && *it >= begin - 1; ++it) {
        begin = *it;
    }
    return begin;
}

// The first position that is missing, from the first one on.
static llama_pos kv_first_gap(const std::vector<llama_pos> & positions) {
    llama_pos next = positions.front();
    for (auto it = positions.begin(); it != positions.end() && *it <= next; ++it) {
        next = *it + 1;
    }
    return next;
}

static bool kv_removable(const llama_kv_cells & cells, llama_seq_id s, llama_pos p0, llama_pos p1) {
    const llama_pos begin = cells.seq_pos_min(s), end = cells.seq_pos_max(s) + 1;
    if (p0 >= end || p1 <= begin || (p0 <= begin && p1 >= end)) {
        return true;
    }
    const std::vector<llama_pos> positions = kv_positions(cells, s);
    return p1 >= end && (p0 <= kv_first_gap(positions) || p0 >= kv_end_run(positions));
}

bool ggml_ext_kv_remove(ggml_ext_kv & ext, const std::vector<llama_kv_cells> & cells, llama_seq_id s, llama_pos p0,
                        llama_pos p1) {
    if (ext.paged) {
        if (!ext.paged->removable(s, p0, p1)) {
            return false;
        }
        ext.paged->remove(s, p0, p1);
        return true;
    }
    if (ext.evicts) {
        return true;
    }
    for (const llama_kv_cells & stream : cells) {
        for (llama_seq_id other = s < 0 ? 0 : s; other < (s < 0 ? LLAMA_MAX_SEQ : s + 1); ++other) {
            if (stream.seq_pos_max(other) >= 0 && !kv_removable(stream, other, p0, p1)) {
                return false;
            }
        }
    }
    return true;
}

llama_pos ggml_ext_kv_pos_min(const ggml_ext_kv & ext, const llama_kv_cells & cells, llama_seq_id s) {
    const llama_pos begin = cells.seq_pos_min(s);
    if (begin < 0) {
        return begin;
    }
    if (ext.paged) {
        return std::max(begin, std::min(ext.paged->last_lost(s) + 1, cells.seq_pos_max(s)));
    }
    const std::vector<llama_pos> positions = kv_positions(cells, s);
    return kv_first_gap(positions) > positions.back() ? begin : kv_end_run(positions);
}
