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
    for (llama_seq_id s = 0; s < llama_seq_id(cache.get_n_seq_max()); ++s) {
        const ggml_ext_kv_spent spent(&ext, cache.get_cells(s), ubatch);
        if (spent.first_kept(s) > ext.sink) {
            cache.seq_rm(s, ext.sink, spent.first_kept(s));
        }
    }
    ext.evicts = false;
}

// The first position of the contiguous run at a sequence's end; -1 for an empty sequence.
static llama_pos kv_end_run(const llama_kv_cells & cells, llama_seq_id s) {
    const auto & positions = cells.seq_pos_get(s);
    llama_pos    begin     = -1;
    for (auto it = positions.rbegin(); it != positions.rend(); ++it) {
        if (begin >= 0 && it->first < begin - 1) {
            break;
        }
        begin = it->first;
    }
    return begin;
}

// The first position that is missing in a sequence; 0 for an empty one.
static llama_pos kv_first_gap(const llama_kv_cells & cells, llama_seq_id s) {
    llama_pos next = std::max(0, cells.seq_pos_min(s));
    for (const auto & [position, cell] : cells.seq_pos_get(s)) {
        if (position > next) {
            break;
        }
        next = position + 1;
    }
    return next;
}

static bool kv_removable(const llama_kv_cells & cells, llama_seq_id s, llama_pos p0, llama_pos p1) {
    const llama_pos begin = cells.seq_pos_min(s), end = cells.seq_pos_max(s) + 1;
    if (p0 >= end || p1 <= begin || (p0 <= begin && p1 >= end)) {
        return true;
    }
    return p1 >= end && (p0 <= kv_first_gap(cells, s) || p0 >= kv_end_run(cells, s));
}

bool ggml_ext_kv_remove(ggml_ext_kv & ext, const std::vector<llama_kv_cells> & cells, llama_seq_id s, llama_pos p0,
                        llama_pos p1) {
    if (ext.paged) {
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
    return ext.paged || begin < 0 || kv_first_gap(cells, s) > cells.seq_pos_max(s) ? begin : kv_end_run(cells, s);
}
