#include "paged_graph.h"

#include "core/ext_op.h"
#include "llama-adapter.h"
#include "llama-graph.h"
#include "llama-hparams.h"
#include "paged.h"
#include "transform/hooks.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr uint32_t entries_step   = 8;    // 512 tokens
constexpr uint32_t positions_step = 512;  // a graph is built anew when they are used up

uint32_t lanes_of(const llama_ubatch & ubatch) {
    return std::max(1u, ubatch.n_seqs_unq);
}

// What beside the tokens up to it a row depends on; empty where that can change without a new graph, and where rows
// depend on later tokens.
std::vector<uint64_t> kind_of(const llm_graph_params & params) {
    if (!params.cparams.causal_attn || params.cparams.warmup) {
        return {};
    }
    for (uint32_t il = 0; params.cvec && il < params.hparams.n_layer(); ++il) {
        if (params.cvec->tensor_for(int(il))) {
            return {};
        }
    }
    std::vector<uint64_t> kind = { 0 };  // not empty without adapters
    if (params.loras) {
        std::map<uint64_t, float> adapters;
        for (const auto & [adapter, scale] : *params.loras) {
            adapters[ggml_ext_llama_adapter_number(*adapter)] = scale;
        }
        for (const auto & [adapter, scale] : adapters) {
            uint32_t bits;
            std::memcpy(&bits, &scale, sizeof(bits));
            kind.insert(kind.end(), { adapter, bits });
        }
    }
    return kind;
}

class kv_input : public llm_graph_input_i {
  public:
    kv_input(ggml_ext_kv_paged & paged, uint32_t kind, uint32_t n_tokens, uint32_t n_lanes) :
        paged(paged), kind(kind), n_tokens(n_tokens), n_lanes(n_lanes),
        n_entries(GGML_PAD(paged.n_entries(), entries_step)),
        n_positions(GGML_PAD(paged.n_positions(), positions_step)) {}

    void make(ggml_context * ctx) {
        slots = input(ctx, paged.n_lists(), n_tokens, "kv_slots");
        table = input(ctx, int64_t(n_lanes) * paged.n_lists() * (1 + 2 * int64_t(n_entries)) + 1, 1, "kv_table");
        cells = input(ctx, n_positions, n_lanes, "kv_cells");
        order = input(ctx, n_lanes + 1 + n_tokens, 1, "kv_order");
    }

    void set_input(const llama_ubatch *) override {
        std::vector<int32_t> data;
        const auto           set = [&](ggml_tensor * tensor, const auto & fill) {
            data.assign(ggml_nelements(tensor), 0);
            fill(data.data());
            ggml_backend_tensor_set(tensor, data.data(), 0, ggml_nbytes(tensor));
        };
        set(slots, [&](int32_t * to) { paged.fill_slots(to); });
        set(table, [&](int32_t * to) { paged.fill_table(to, n_lanes); });
        set(cells, [&](int32_t * to) { paged.fill_cells(to, n_lanes, n_positions); });
        set(order, [&](int32_t * to) { paged.fill_order(to, n_lanes); });
        paged.end(kind);
    }

    bool can_reuse(const llm_graph_params & params) override {
        return params.ubatch.n_tokens == n_tokens && lanes_of(params.ubatch) == n_lanes &&
               paged.n_entries() <= n_entries && paged.n_positions() <= n_positions;
    }

    ggml_tensor * slots = nullptr;
    ggml_tensor * table = nullptr;
    ggml_tensor * cells = nullptr;
    ggml_tensor * order = nullptr;

  private:
    static ggml_tensor * input(ggml_context * ctx, int64_t ne0, int64_t ne1, const char * name) {
        ggml_tensor * tensor = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, ne0, ne1);
        ggml_set_name(tensor, name);
        ggml_set_input(tensor);
        return tensor;
    }

    ggml_ext_kv_paged & paged;
    const uint32_t      kind, n_tokens, n_lanes, n_entries, n_positions;
};

}  // namespace

ggml_ext_kv_graph::cache & ggml_ext_kv_graph::use(ggml_context * ctx, ggml_ext_kv_paged & paged) {
    const auto found = caches.find(&paged);
    if (found != caches.end()) {
        return found->second;
    }
    auto input = std::make_unique<kv_input>(paged, paged.number_of(kind_of(params)), params.ubatch.n_tokens,
                                            lanes_of(params.ubatch));
    input->make(ctx);
    cache & made = caches[&paged];
    made         = { input->slots, input->table, input->cells, input->order, paged.pool() };
    params.res->add_input(std::move(input));
    return made;
}

void ggml_ext_kv_graph::read(const ggml_tensor * matrix, ggml_tensor * x) {
    const auto is = [&](const ggml_ext_kv_probe & probe) { return probe.reads == matrix; };
    if (probes && std::any_of(probes->layers.begin(), probes->layers.end(), is)) {
        inputs[matrix] = x;
    }
}

// What kv_store makes a layer's scores of: keys, or the scores themselves; null: kv_score gives them.
ggml_tensor * ggml_ext_kv_graph::scores(ggml_context * ctx, const ggml_ext_kv_paged & paged, uint32_t il) {
    if (paged.policy() != ggml_ext_kv_policy::probe) {
        return paged.attended() ? nullptr : key;
    }
    const ggml_ext_kv_probe & probe = probes->layers[il];
    const auto                x     = inputs.find(probe.reads);
    if (x == inputs.end() || x->second->ne[0] != probe.weight->ne[0] || ggml_nrows(x->second) != key->ne[2]) {
        fault = "ggml-ext: this graph makes layer " + std::to_string(il) +
                "'s keys in a way that its probe cannot read; take GGML_EXT_KV=...,policy=norm";
        return key;
    }
    ggml_tensor * score = ggml_add(ctx, ggml_mul_mat(ctx, probe.weight, x->second), probe.bias);
    return ggml_reshape_3d(ctx, score, 1, key->ne[1], key->ne[2]);
}

ggml_tensor * ggml_ext_kv_graph::store(ggml_context * ctx, ggml_ext_kv_paged & paged, ggml_tensor * x,
                                       ggml_tensor * cells, const ggml_tensor * name, bool v) {
    const ggml_ext_kv_paged::layer & layer = *paged.find(name);
    const ggml_ext_kv_block          block = paged.block_of(layer);
    cache &                          c     = use(ctx, paged);
    ggml_tensor *                    slots =
        ggml_view_2d(ctx, c.slots, layer.n_head_kv, c.slots->ne[1], c.slots->nb[1], layer.first_list * sizeof(int32_t));
    if (paged.cold() && !v) {
        try {
            paged.cold()->turned(layer.index, key);
        } catch (const std::exception & error) {
            fault = error.what();
        }
    }
    const bool scored = paged.scored() && !v;
    c.stored =
        ggml_ext_kv_store(ctx, c.stored, x, slots, cells, scored ? scores(ctx, paged, layer.il) : nullptr,
                          v ? layer.type_v : layer.type_k, int(v ? block.v : block.k), scored ? int(block.score) : 0);
    return c.stored;
}

ggml_tensor * ggml_ext_kv_graph::attend(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * bias,
                                        ggml_tensor * mask, ggml_tensor * sinks, ggml_tensor * v_mla, float scale,
                                        const llama_hparams & hparams) {
    for (auto & [paged, c] : caches) {
        const ggml_ext_kv_paged::layer * layer = paged->find(k);
        if (!layer) {
            continue;
        }
        if (bias || v_mla || mask->type != GGML_TYPE_F16) {
            fault = std::string("ggml-ext: attention ") +
                    (bias  ? "with a bias" :
                     v_mla ? "over a latent" :
                             "without -fa") +
                    " cannot read a paged KV cache; unset GGML_EXT_KV";
            return ggml_new_tensor_2d(ctx, GGML_TYPE_F32, layer->dv * q->ne[1], q->ne[2]);
        }
        const int64_t n_stream = mask->ne[3];
        q = ggml_view_4d(ctx, q, q->ne[0], q->ne[1], q->ne[2] / n_stream, n_stream, q->nb[1], q->nb[2],
                         q->nb[2] * (q->ne[2] / n_stream), 0);
        q = ggml_permute(ctx, q, 0, 2, 1, 3);

        ggml_ext_kv_attend_params p = {};
        p.type_k                    = layer->type_k;
        p.type_v                    = layer->type_v;
        p.dk                        = layer->dk;
        p.dv                        = layer->dv;
        p.n_head_kv                 = layer->n_head_kv;
        p.first_list                = int32_t(layer->first_list);
        p.n_lists                   = int32_t(paged->n_lists());
        p.scale                     = scale;
        p.max_bias                  = hparams.f_max_alibi_bias;
        p.cap                       = hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f;
        if (paged->evicts()) {  // lists are shorter than the mask; without that tasks, and so bits, are upstream's
            const int64_t n_lists = c.cells->ne[1] * paged->n_lists();
            p.n_keys              = int32_t((c.table->ne[0] - 1 - n_lists) / 2 / n_lists * GGML_EXT_KV_SLOTS);
        }
        if (paged->attended() && ggml_ext_kv_paged::scores_by(q->ne[1] * q->ne[3])) {
            ggml_ext_kv_score_params scoring = paged->scoring();
            scoring.attend                   = p;
            scoring.score                    = int32_t(paged->block_of(*layer).score);
            c.stored = ggml_ext_kv_score(ctx, q, c.stored, c.table, c.cells, c.order, mask, sinks, &scoring);
        }
        const bool              coded = paged->cold() && fault.empty();
        const ggml_ext_kv_codes codes = coded ? paged->cold()->codes_of(layer->index) : ggml_ext_kv_codes();
        ggml_tensor *           out =
            ggml_ext_kv_attend(ctx, q, c.stored, c.table, c.cells, c.order, mask, sinks, &p, coded ? &codes : nullptr);
        return ggml_reshape_2d(ctx, out, out->ne[0] * out->ne[1], out->ne[2] * out->ne[3]);
    }
    return nullptr;
}

void ggml_ext_kv_graph::check(const ggml_tensor * node) const {
    for (const ggml_tensor * source : node->src) {
        for (const auto & [paged, c] : caches) {
            if (source && paged->find(source)) {
                throw std::runtime_error(
                    std::string("ggml-ext: node '") + node->name + "' (" + ggml_op_name(node->op) +
                    ") reads a KV cache in a way that paged storage cannot serve; unset GGML_EXT_KV");
            }
        }
    }
}
