// Transforms in a graph: inserted where weights are multiplied, and checked once the graph is complete.

#include "core/ext_op.h"
#include "kron/kron.h"
#include "kv/paged_graph.h"
#include "llama-arch.h"
#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-model.h"
#include "observe/observer.h"
#include "transform.h"

#include <stdexcept>
#include <string>

namespace {

thread_local ggml_ext_graph * innermost = nullptr;

bool is_view_op(const ggml_tensor * node) {
    return node->op == GGML_OP_VIEW || node->op == GGML_OP_RESHAPE || node->op == GGML_OP_PERMUTE ||
           node->op == GGML_OP_TRANSPOSE;
}

bool is_product(const ggml_tensor * node) {
    return node->op == GGML_OP_MUL_MAT || node->op == GGML_OP_MUL_MAT_ID;
}

const ggml_ext_weight * find(const ggml_ext_model & ext, const ggml_tensor * w) {
    const auto found = ext.weights.find(ggml_ext_root(w));
    return found == ext.weights.end() ? nullptr : &found->second;
}

}  // namespace

ggml_ext_graph::ggml_ext_graph(const llama_model & model, const llm_graph_params & params) :
    kv(std::make_unique<ggml_ext_kv_graph>(params, model.ggml_ext ? &model.ggml_ext->probes : nullptr)), model(model),
    observed(params.cparams.cb_eval != nullptr),
    observer(params.cparams.cb_eval == ggml_ext_observer_eval ?
                 static_cast<ggml_ext_observer *>(params.cparams.cb_eval_user_data) :
                 nullptr),
    ext(model.ggml_ext), outer(innermost) {
    innermost = this;
}

ggml_ext_graph::~ggml_ext_graph() {
    innermost = outer;
}

ggml_ext_graph * ggml_ext_graph::current() {
    return innermost;
}

ggml_tensor * ggml_ext_graph::input(ggml_context * ctx, ggml_tensor * w, ggml_tensor * x) {
    if (observer) {
        asked.emplace(ggml_ext_root(w), x);
    }
    kv->read(ggml_ext_root(w), x);
    const ggml_ext_weight * weight = ext ? find(*ext, w) : nullptr;
    if (!weight || x->type != GGML_TYPE_F32 || (weight->site && weight->site->n != x->ne[0])) {
        return x;  // check() refuses the product of a weight in the map with an input that stayed as it was
    }
    if (weight->site) {
        const ggml_ext_site & site   = *weight->site;
        ggml_tensor *&        shared = transformed[{ x, &site }];
        if (!shared) {
            shared = ggml_ext_kron(ctx, ggml_ext_with_adjacent_values(ctx, x), site.left, site.right, site.hadamard,
                                   site.clip);
            if (!observed) {
                ggml_ext_kron_set_unobserved(shared);
            }
        }
        x = shared;
    }
    if (weight->round) {
        ggml_tensor *& shared = rounded[x];
        if (!shared) {
            shared = ggml_ext_act_round(ctx, ggml_ext_with_adjacent_values(ctx, x), int(ext->activation.bits),
                                        int(ext->activation.group));
        }
        x = shared;
    }
    products.emplace(ggml_ext_root(w), x);
    return x;
}

void ggml_ext_graph::check_weights(const ggml_tensor * node) const {
    for (const ggml_tensor * source : node->src) {
        const ggml_ext_weight * weight = source ? find(*ext, source) : nullptr;
        if (!weight ||
            (is_product(node) && source == node->src[0] && products.count({ ggml_ext_root(source), node->src[1] }))) {
            continue;
        }
        // Rounding concerns products only; a transform concerns whatever reads the weight.
        if (weight->site || (is_product(node) && source == node->src[0])) {
            throw std::runtime_error(std::string("ggml-ext: architecture '") + llm_arch_name(model.arch) +
                                     "' uses tensor '" + ggml_ext_root(source)->name + "' in a way that " +
                                     (weight->site ? "its transform" : "GGML_EXT_ACT=a4") +
                                     " cannot reach; convert the model without online transforms and run it with a8");
        }
    }
}

bool ggml_ext_graph::check(ggml_cgraph * gf) const {
    if (observer) {
        observer->walk(model, gf, asked);
    }
    if (!ext && !kv->used()) {
        return true;
    }
    try {
        if (!kv->fault.empty()) {
            throw std::runtime_error(kv->fault);
        }
        for (int i = 0; i < ggml_graph_n_nodes(gf); i++) {
            const ggml_tensor * node = ggml_graph_node(gf, i);
            if (!is_view_op(node)) {
                if (ext) {
                    check_weights(node);
                    check_caches(node);
                }
                kv->check(node);
            }
        }
    } catch (const std::runtime_error & error) {
        // llama_decode, which builds graphs too, has callers in C.
        LLAMA_LOG_ERROR("%s\n", error.what());
        return false;
    }
    return true;
}

ggml_tensor * ggml_ext_llama_input(ggml_context * ctx, ggml_tensor * w, ggml_tensor * x) {
    ggml_ext_graph * graph = ggml_ext_graph::current();
    return graph ? graph->input(ctx, w, x) : x;
}
