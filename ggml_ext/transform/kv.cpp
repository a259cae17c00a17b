// Per-head transforms of a quantised KV cache: k' = k P, q' = q P^-T, v' = v P_v, and P_v^-1 on the result
// of attention. They take the place of upstream's Hadamard rotation, and act where that acts.

#include "core/ext_op.h"
#include "kv/hooks.h"
#include "kv/paged_graph.h"
#include "llama-arch.h"
#include "llama-impl.h"
#include "llama-model.h"
#include "transform.h"

#include <stdexcept>
#include <string>

namespace {

// x [head_dim, ...] with every head times factor.
ggml_tensor * times(ggml_context * ctx, ggml_tensor * x, ggml_tensor * factor) {
    return ggml_ext_kron(ctx, ggml_ext_with_adjacent_values(ctx, x), nullptr, factor, 0, 1.0f);
}

bool learned_k(const llama_model & model, ggml_type type) {
    return model.ggml_ext && model.ggml_ext->has_k && ggml_is_quantized(type);
}

bool learned_v(const llama_model & model, ggml_type type) {
    return model.ggml_ext && model.ggml_ext->has_v && ggml_is_quantized(type);
}

}  // namespace

ggml_tensor * ggml_ext_graph::store_k(ggml_context * ctx, ggml_tensor * x, ggml_tensor * cache, int il) {
    ggml_tensor * factor = learned_k(model, cache->type) ? ext->heads.at(il).k : nullptr;
    if (!factor) {
        return x;
    }
    k_caches.insert(ggml_ext_root(cache));
    return times(ctx, x, factor);
}

ggml_tensor * ggml_ext_graph::store_v(ggml_context * ctx, ggml_tensor * x, ggml_tensor * cache, int il) {
    ggml_tensor * factor = learned_v(model, cache->type) ? ext->heads.at(il).v : nullptr;
    if (!factor) {
        return x;
    }
    v_caches.insert(ggml_ext_root(cache));
    return times(ctx, x, factor);
}

ggml_tensor * ggml_ext_graph::query(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, int il) {
    ggml_tensor * factor = ext && k_caches.count(ggml_ext_root(k)) ? ext->heads.at(il).q : nullptr;
    if (!factor) {
        return q;
    }
    q = times(ctx, q, factor);
    queries.insert(q);
    return q;
}

ggml_tensor * ggml_ext_graph::attention(ggml_context * ctx, ggml_tensor * out, ggml_tensor * v, int il) {
    ggml_tensor * factor = ext && v_caches.count(ggml_ext_root(v)) ? ext->heads.at(il).out : nullptr;
    if (!factor) {
        return out;
    }
    results.insert(ggml_ext_root(out));
    return times(ctx, out, factor);
}

void ggml_ext_graph::check_caches(const ggml_tensor * node) const {
    if (k_caches.empty() && v_caches.empty()) {
        return;
    }
    for (int i = 0; i < GGML_MAX_SRC && node->src[i]; i++) {
        const ggml_tensor * cache = ggml_ext_root(node->src[i]);
        const bool          is_k  = k_caches.count(cache) > 0;
        const bool          is_v  = v_caches.count(cache) > 0;
        if (!(is_k || is_v) || ggml_ext_root(node) == cache) {  // the latter writes to it
            continue;
        }
        const bool flash = node->op == GGML_OP_FLASH_ATTN_EXT;
        const bool known =
            is_k ? (flash && i == 1 && queries.count(ggml_ext_root(node->src[0]))) ||
                       (node->op == GGML_OP_MUL_MAT && i == 0 && queries.count(ggml_ext_root(node->src[1]))) :
                   flash && i == 2 && results.count(node);
        if (!known) {
            throw std::runtime_error(std::string("ggml-ext: architecture '") + llm_arch_name(model.arch) + "' reads '" +
                                     cache->name +
                                     "' in a way that learned KV transforms cannot reach; use an f16 cache");
        }
    }
}

ggml_tensor * ggml_ext_llama_store_k(const ggml_ext_kv * kv, ggml_context * ctx, ggml_tensor *& x, ggml_tensor * cells,
                                     ggml_tensor * cache, int il) {
    ggml_ext_graph * graph = ggml_ext_graph::current();
    if (!graph) {
        return nullptr;
    }
    graph->kv->key = x;
    if (!ggml_ext_kv_codes_rows(kv)) {
        x = graph->store_k(ctx, x, cache, il);
    }
    return ggml_ext_kv_store_k(kv, ctx, x, cells, cache);
}

ggml_tensor * ggml_ext_llama_store_v(const ggml_ext_kv * kv, ggml_context * ctx, ggml_tensor *& x, ggml_tensor * cells,
                                     ggml_tensor * cache, int il) {
    ggml_ext_graph * graph = ggml_ext_graph::current();
    if (!graph) {
        return nullptr;
    }
    if (!ggml_ext_kv_codes_rows(kv)) {
        x = graph->store_v(ctx, x, cache, il);
    }
    return ggml_ext_kv_store_v(kv, ctx, x, cells, cache);
}

ggml_tensor * ggml_ext_llama_query(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, int il) {
    ggml_ext_graph * graph = ggml_ext_graph::current();
    return graph ? graph->query(ctx, q, k, il) : q;
}

ggml_tensor * ggml_ext_llama_attention(ggml_context * ctx, ggml_tensor * out, ggml_tensor * v, int il) {
    ggml_ext_graph * graph = ggml_ext_graph::current();
    return graph ? graph->attention(ctx, out, v, il) : out;
}

void ggml_ext_llama_cache(const llama_model & model, const llama_model * source, ggml_type type_k, ggml_type type_v,
                          bool & rotate_k, bool & rotate_v) {
    if (source && (learned_k(*source, type_k) || learned_v(*source, type_v))) {
        throw std::runtime_error(
            "ggml-ext: a draft model cannot share a cache that has learned KV transforms; use an f16 cache");
    }
    if (ggml_ext_kv_will_code()) {
        rotate_k = rotate_v = false;
        return;
    }
    if (learned_k(model, type_k)) {
        rotate_k = false;
        LLAMA_LOG_INFO("ggml-ext: learned transform of K in the place of attention rotation\n");
    }
    if (learned_v(model, type_v)) {
        rotate_v = false;
        LLAMA_LOG_INFO("ggml-ext: learned transform of V in the place of attention rotation\n");
    }
}

bool ggml_ext_llama_fixes_k(const llama_model & model, ggml_type type_k) {
    return learned_k(model, type_k);
}
