// Transforms of activations inside llama.cpp: what upstream's files call. docs/gguf.md has the format,
// docs/upstream.md the place of each call.

#pragma once

#include "ggml.h"

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <utility>

struct ggml_ext_kv;
struct ggml_ext_model;
struct ggml_ext_observer;
struct ggml_ext_site;
class ggml_ext_kv_graph;
class llama_io_read_i;
class llama_io_write_i;
struct llama_adapter_lora;
struct llama_model;
struct llama_model_loader;
struct llm_graph_params;

// Reads the transforms and the activation precision of a model into model.ggml_ext; leaves it empty
// where there is nothing to do. Consumes every transform tensor of the file. Called once all weights
// have their tensors, before their data is read.
// Throws std::runtime_error, which names the tensor, the key or the environment variable, for whatever
// docs/gguf.md has a reader refuse.
void ggml_ext_llama_load(llama_model_loader & ml, llama_model & model);

// The time in which one graph of a model is built, by one thread, inside llama_model::build_graph. The
// functions below find it through a thread-local pointer: a graph's shared tensors live exactly as
// long as its construction. Outside of it they change nothing.
class ggml_ext_graph {
  public:
    // Keeps params by reference.
    ggml_ext_graph(const llama_model & model, const llm_graph_params & params);
    ~ggml_ext_graph();
    ggml_ext_graph(const ggml_ext_graph &)             = delete;
    ggml_ext_graph & operator=(const ggml_ext_graph &) = delete;

    // False, with an error in the log that names what is read, when the graph reads a transformed weight, a transformed
    // cache or a paged one without going through our functions.
    bool check(ggml_cgraph * gf) const;

    // The one that this thread is building, or null.
    static ggml_ext_graph * current();

    // See the functions of the same names below.
    ggml_tensor * input(ggml_context * ctx, ggml_tensor * w, ggml_tensor * x);
    ggml_tensor * store_k(ggml_context * ctx, ggml_tensor * x, ggml_tensor * cache, int il);
    ggml_tensor * store_v(ggml_context * ctx, ggml_tensor * x, ggml_tensor * cache, int il);
    ggml_tensor * query(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, int il);
    ggml_tensor * attention(ggml_context * ctx, ggml_tensor * out, ggml_tensor * v, int il);

    const std::unique_ptr<ggml_ext_kv_graph> kv;  // its paged caches

  private:
    void check_weights(const ggml_tensor * node) const;
    void check_caches(const ggml_tensor * node) const;

    const llama_model &                   model;
    const bool                            observed;  // an evaluation callback sees the nodes
    ggml_ext_observer * const             observer;  // whose callback it is, or null
    std::shared_ptr<const ggml_ext_model> ext;
    ggml_ext_graph * const                outer;

    std::map<std::pair<const ggml_tensor *, const ggml_ext_site *>, ggml_tensor *> transformed;  // by input
    std::map<const ggml_tensor *, ggml_tensor *>                                   rounded;      // by input
    std::set<std::pair<const ggml_tensor *, const ggml_tensor *>> products;            // weight, what it multiplies
    std::set<std::pair<const ggml_tensor *, const ggml_tensor *>> asked;               // the same, of all weights
    std::set<const ggml_tensor *>                                 k_caches, v_caches;  // of transformed rows
    std::set<const ggml_tensor *>                                 queries;             // transformed
    std::set<const ggml_tensor *>                                 results;             // of attention, before P_v^-1
};

// What weight w multiplies in the place of x: x itself, or x transformed, clipped and rounded.
// Matrices that read the same x share the result. Called by build_lora_mm and build_lora_mm_id.
ggml_tensor * ggml_ext_llama_input(ggml_context * ctx, ggml_tensor * w, ggml_tensor * x);

// Makes of the rows x [head_dim, n_head_kv, n_tokens] what layer il's cache of K or V holds. kv: ours of that cache, or
// null. Where it is paged returns the node that stores them, else null: upstream stores x.
ggml_tensor * ggml_ext_llama_store_k(const ggml_ext_kv * kv, ggml_context * ctx, ggml_tensor *& x, ggml_tensor * cells,
                                     ggml_tensor * cache, int il);
ggml_tensor * ggml_ext_llama_store_v(const ggml_ext_kv * kv, ggml_context * ctx, ggml_tensor *& x, ggml_tensor * cells,
                                     ggml_tensor * cache, int il);

// q [head_dim, n_head, n_tokens] as it meets k, a view of layer il's cache or anything else.
ggml_tensor * ggml_ext_llama_query(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, int il);

// The attention result out [n_head * head_dim, n_tokens], computed from v, with V's transform undone.
ggml_tensor * ggml_ext_llama_attention(ggml_context * ctx, ggml_tensor * out, ggml_tensor * v, int il);

// For the constructor of a KV cache: turns upstream's rotations off where learned transforms take their
// place, and says so. source: the model whose cache is shared, or null. Throws std::runtime_error when
// that cache is transformed, since this model's queries are not.
void ggml_ext_llama_cache(const llama_model & model, const llama_model * source, ggml_type type_k, ggml_type type_v,
                          bool & rotate_k, bool & rotate_v);

// Whether a K cache of this type holds transformed rows, which cannot be shifted: RoPE acts before the
// transform.
bool ggml_ext_llama_fixes_k(const llama_model & model, ggml_type type_k);

// Brings an adapter, which was made for the original model, into the basis of a transformed one, in place. Called
// once its tensors have their data. Throws std::runtime_error, which names the tensor, where the file does not
// record what was folded into that matrix.
void ggml_ext_llama_adapter(const llama_model & model, llama_adapter_lora & adapter);

// Which of all adapters that this process has loaded it is.
uint64_t ggml_ext_llama_adapter_number(const llama_adapter_lora & adapter);

// For a KV cache's saved state, in front of it: the digest of the model's transforms, nothing for a model without
// any. Reading throws std::runtime_error unless the digest is the model's own.
void ggml_ext_llama_write_state(const llama_model & model, llama_io_write_i & io);
void ggml_ext_llama_read_state(const llama_model & model, llama_io_read_i & io);
