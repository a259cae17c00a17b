#include "prefixes.h"

#include <algorithm>

void ggml_ext_kv_prefixes::add(uint32_t lane, llama_pos position, llama_token token, uint32_t kind) {
    if (size_t(position) == lanes[lane].tokens.size()) {
        lanes[lane].tokens.emplace_back(token, kind);
    }
}

void ggml_ext_kv_prefixes::cut(uint32_t lane, llama_pos p0) {
    const size_t n = size_t(std::max(p0, 0));
    if (n < lanes[lane].tokens.size()) {
        lanes[lane].tokens.resize(n);
        lanes[lane].path.resize(std::min(lanes[lane].path.size(), n / n_slots));
    }
}

void ggml_ext_kv_prefixes::copy(uint32_t from, uint32_t to, llama_pos p0, llama_pos p1) {
    if (p0 > 0 || !lanes[to].tokens.empty()) {
        return;
    }
    lanes[to] = lanes[from];
    cut(to, p1);
}

bool ggml_ext_kv_prefixes::alive(const node & node, const ggml_ext_kv_pages & pages) {
    return std::all_of(node.blocks.begin(), node.blocks.end(),
                       [&](const auto & block) { return pages.generation(block.first) == block.second; });
}

void ggml_ext_kv_prefixes::merge(uint32_t l, ggml_ext_kv_pages & pages) {
    lane & lane = lanes[l];
    while ((lane.path.size() + 1) * n_slots <= lane.tokens.size()) {
        const size_t i = lane.path.size();  // of the block, in each list
        for (uint32_t list = 0; list < pages.n_lists(); ++list) {
            if (!pages.is_whole(l, list, i)) {
                return;
            }
        }
        std::pair<uint64_t, block_tokens> key;
        key.first = i > 0 ? lane.path[i - 1] : 0;
        std::copy_n(lane.tokens.begin() + ptrdiff_t(i * n_slots), n_slots, key.second.begin());
        node & node = nodes[key];
        node.id     = node.id ? node.id : ++n_ids;
        lane.path.push_back(node.id);
        if (!node.blocks.empty() && alive(node, pages)) {
            for (uint32_t list = 0; list < pages.n_lists(); ++list) {
                pages.replace(l, list, i, node.blocks[list].first);
            }
            continue;
        }
        node.blocks.clear();
        for (uint32_t list = 0; list < pages.n_lists(); ++list) {
            const int32_t block = pages.list(l, list)[i].block;
            node.blocks.emplace_back(block, pages.generation(block));
        }
    }
    if (nodes.size() * pages.n_lists() > 2 * size_t(pages.n_blocks())) {
        purge(pages);
    }
}

// Nodes whose blocks are gone. A lane that holds none of them asks for none either.
void ggml_ext_kv_prefixes::purge(const ggml_ext_kv_pages & pages) {
    for (auto it = nodes.begin(); it != nodes.end();) {
        it = alive(it->second, pages) ? std::next(it) : nodes.erase(it);
    }
}
