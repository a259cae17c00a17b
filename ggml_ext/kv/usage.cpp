#include "usage.h"

#include "budget.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-kv-cells.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <sstream>
#include <vector>

namespace {

const llama_kv_cache * usage_cache(const llama_memory_i * memory) {
    if (const auto * hybrid = dynamic_cast<const llama_memory_hybrid *>(memory)) {
        return hybrid->get_mem_attn();
    }
    if (const auto * hybrid = dynamic_cast<const llama_memory_hybrid_iswa *>(memory)) {
        memory = hybrid->get_mem_attn();
    }
    if (const auto * both = dynamic_cast<const llama_kv_cache_iswa *>(memory)) {
        return both->get_base();
    }
    return dynamic_cast<const llama_kv_cache *>(memory);
}

uint64_t usage_bits(const ggml_ext_kv_entry & run) {
    return run.count > 0 ? ~uint64_t(0) >> (GGML_EXT_KV_SLOTS - run.count) << run.begin : 0;
}

struct usage_count {
    uint64_t slots = 0, shared = 0, blocks = 0;
};

// Of all lists of a lane.
usage_count usage_of_lane(const ggml_ext_kv_pages & pages, uint32_t lane) {
    usage_count total;
    for (uint32_t list = 0; list < pages.n_lists(); ++list) {
        struct part {
            uint64_t mine = 0, others = 0;
            uint32_t runs = 0;
        };

        std::map<int32_t, part> blocks;
        for (const ggml_ext_kv_entry & run : pages.list(lane, list)) {
            part & part = blocks[run.block];
            part.mine |= usage_bits(run);
            part.runs++;
        }
        const bool alone = std::all_of(blocks.begin(), blocks.end(), [&](const auto & found) {
            return pages.references(found.first) == found.second.runs;
        });
        for (uint32_t other = 0; other < pages.n_lanes() && !alone; ++other) {
            for (const ggml_ext_kv_entry & run : pages.list(other, list)) {
                const auto found = other == lane ? blocks.end() : blocks.find(run.block);
                if (found != blocks.end()) {
                    found->second.others |= usage_bits(run);
                }
            }
        }
        for (const auto & [block, part] : blocks) {
            total.slots += uint64_t(__builtin_popcountll(part.mine));
            total.shared += uint64_t(__builtin_popcountll(part.mine & part.others));
        }
        total.blocks += blocks.size();
    }
    return total;
}

usage_count usage_cells(const llama_kv_cells & cells, llama_seq_id s) {
    usage_count count;
    for (uint32_t cell = 0; cell < cells.size(); ++cell) {
        if (!cells.is_empty(cell) && cells.seq_has(cell, s)) {
            count.slots++;
            count.shared += cells.seq_count(cell) > 1;
        }
    }
    return count;
}

ggml_ext_kv_usage usage_of_window(const llama_kv_cache & cache, llama_seq_id s) {
    ggml_ext_kv_usage usage;
    usage.policy = "window";
    for (const llama_kv_cells & cells : *cache.ext->cells) {
        if (cells.seq_pos_max(s) < 0) {
            continue;
        }
        const usage_count count = usage_cells(cells, s);
        usage.tokens            = double(cells.seq_pos_max(s) + 1);
        usage.rows              = double(count.slots);
        usage.shared            = double(count.shared);
        usage.evicted           = usage.tokens - usage.rows;
        size_t bytes            = 0;
        for (const auto & [type, size] : cache.memory_breakdown()) {
            bytes += size;
        }
        usage.bytes = bytes / (size_t(cells.size()) * cache.ext->cells->size()) * count.slots;
    }
    return usage;
}

std::mutex  usage_guard;
std::string usage_noted;

}  // namespace

ggml_ext_kv_usage ggml_ext_kv_paged::usage(llama_seq_id s) const {
    ggml_ext_kv_usage usage;
    usage.policy       = ggml_ext_kv_policy_name(rule.policy);
    const double heads = std::max(1u, lists);
    for (const bool cold : { false, true }) {
        if (cold && !codes) {
            continue;
        }
        const usage_count count           = usage_of_lane(pages_of(cold), uint32_t(s));
        (cold ? usage.codes : usage.rows) = double(count.slots) / heads;
        usage.shared += double(count.shared) / heads;
        usage.bytes += count.blocks * (cold ? codes->block_bytes() : block_size);
    }
    return usage;
}

ggml_ext_kv_usage ggml_ext_kv_usage_of(llama_context * ctx, llama_seq_id s) {
    const llama_kv_cache * cache = ctx ? usage_cache(llama_get_memory(ctx)) : nullptr;
    if (!cache || !cache->ext) {
        return {};
    }
    if (!cache->ext->paged) {
        return usage_of_window(*cache, s);
    }
    ggml_ext_kv_usage usage = cache->ext->paged->usage(s);
    for (const llama_kv_cells & cells : *cache->ext->cells) {
        usage.tokens += double(usage_cells(cells, s).slots);
    }
    usage.evicted = cache->ext->paged->n_lists() > 0 ? usage.tokens - usage.rows - usage.codes : 0;
    return usage;
}

void ggml_ext_kv_note_usage(llama_context * ctx, size_t n) {
    struct series {
        const char *name, *help;
        double ggml_ext_kv_usage::* value;
    };

    static const series all[] = {
        { "tokens",         "Tokens in the KV cache",                                     &ggml_ext_kv_usage::tokens  },
        { "tokens_rows",    "Tokens stored as they are, mean over heads",                 &ggml_ext_kv_usage::rows    },
        { "tokens_codes",   "Tokens stored as codes, mean over heads",                    &ggml_ext_kv_usage::codes   },
        { "tokens_evicted", "Tokens no longer stored, mean over heads",                   &ggml_ext_kv_usage::evicted },
        { "tokens_shared",  "Stored tokens that another slot sees, too, mean over heads", &ggml_ext_kv_usage::shared  },
    };

    std::vector<ggml_ext_kv_usage> of_slots;
    for (size_t s = 0; s < n; ++s) {
        of_slots.push_back(ggml_ext_kv_usage_of(ctx, llama_seq_id(s)));
    }
    std::ostringstream text;
    const auto         begin = [&](const std::string & name, const char * help) {
        text << "# HELP " << name << " " << help << "\n# TYPE " << name << " gauge\n";
    };
    if (n > 0 && of_slots[0].policy) {
        for (const series & one : all) {
            const std::string name = std::string("ggml_ext:kv_") + one.name;
            begin(name, one.help);
            for (size_t s = 0; s < n; ++s) {
                text << name << "{slot=\"" << s << "\"} " << of_slots[s].*one.value << "\n";
            }
        }
        begin("ggml_ext:kv_bytes", "Bytes of the blocks that a slot sees, shared ones in full");
        for (size_t s = 0; s < n; ++s) {
            text << "ggml_ext:kv_bytes{slot=\"" << s << "\"} " << of_slots[s].bytes << "\n";
        }
    }
    const std::lock_guard<std::mutex> lock(usage_guard);
    usage_noted = text.str();
}

std::string ggml_ext_kv_noted_usage() {
    const std::lock_guard<std::mutex> lock(usage_guard);
    return usage_noted;
}
