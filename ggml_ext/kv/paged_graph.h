// A paged cache in a graph: rows stored and attended by our sub-ops in the place of upstream's nodes.

#pragma once

#include "ggml.h"
#include "probe.h"

#include <map>
#include <string>

class ggml_ext_kv_paged;
struct llama_hparams;
struct llm_graph_params;

// What the graph that this thread is building knows of paged caches; a member of ggml_ext_graph.
class ggml_ext_kv_graph {
  public:
    // probes may be null; both are kept by reference.
    ggml_ext_kv_graph(const llm_graph_params & params, const ggml_ext_kv_probes * probes) :
        params(params), probes(probes) {}

    // A matrix that multiplies x.
    void read(const ggml_tensor * matrix, ggml_tensor * x);

    ggml_tensor * store(ggml_context * ctx, ggml_ext_kv_paged & paged, ggml_tensor * x, ggml_tensor * cells,
                        const ggml_tensor * name, bool v);

    // Null for a k of another cache.
    ggml_tensor * attend(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * bias, ggml_tensor * mask,
                         ggml_tensor * sinks, ggml_tensor * v_mla, float scale, const llama_hparams & hparams);

    // Throws std::runtime_error where a node reads a paged cache in another way.
    void check(const ggml_tensor * node) const;

    // What store and attend could not do, in one line; the graph is not to be used then. Empty: nothing.
    std::string fault;

    bool used() const { return !caches.empty(); }

    // K's heads that are stored next, before a learned transform, which changes their norms.
    ggml_tensor * key = nullptr;

  private:
    struct cache {
        ggml_tensor * slots;   // I32 [n_lists, n_tokens]
        ggml_tensor * table;   // I32, as ggml_ext_kv_attend has it
        ggml_tensor * cells;   // I32 [n_positions, n_lanes]
        ggml_tensor * order;   // I32
        ggml_tensor * stored;  // the pool behind the last store
    };

    cache &       use(ggml_context * ctx, ggml_ext_kv_paged & paged);
    ggml_tensor * scores(ggml_context * ctx, const ggml_ext_kv_paged & paged, uint32_t il);

    const llm_graph_params &                     params;
    const ggml_ext_kv_probes * const             probes;
    std::map<const ggml_tensor *, ggml_tensor *> inputs;  // of the matrices that probes read
    std::map<ggml_ext_kv_paged *, cache>         caches;
};
