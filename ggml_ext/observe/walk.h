// What a model's graph says about its matrices: which of them read the same activation, and which are never read.
// docs/observe.md has the vocabulary.

#pragma once

#include "ggml.h"

#include <cstdint>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

struct llama_model;

// A product of a weight with an activation. online: it goes through build_lora_mm, where a transform can be put in.
struct ggml_ext_reader {
    std::string weight;
    ggml_op     op;
    bool        online;
};

// One activation of the graph, read once for all its readers. `at`: the node after which it is read; `product`: its first
// reader, whose src[1] it is, and whose src[2] says which experts got which token.
struct ggml_ext_value {
    const ggml_tensor * at;
    const ggml_tensor * product;
    size_t              site;
};

// Where the offline part of a site's transform goes (folds.h). kind: "gain", a vector of n; "rows", rows first to
// first + n - 1 of a matrix; "heads", the same for the rows of v, which attention hands on head by head; empty: nowhere, for
// `reason`. mixes_heads: whether a matrix over the channels of a head is exact too, not only a diagonal.
struct ggml_ext_fold_place {
    std::string kind, tensor, bias, reason;
    int64_t     first = 0, n = 0;
    int64_t     n_head = 0, n_head_kv = 0, head_dim = 0;
    bool        mixes_heads = false;
};

// What some matrices read: the values that share a reader. n: length of a row. n_experts: matrices that each get a part of
// the rows, by MUL_MAT_ID's ids or by index (one matrix per head, say); 0 for a matrix that gets all. rows: of a
// value, per token, at most.
struct ggml_ext_observed {
    std::string                  anchor;
    int64_t                      n         = 0;
    int64_t                      n_experts = 0;
    int64_t                      rows      = 1;
    std::vector<ggml_ext_reader> readers;
    std::vector<std::string>     values;
    ggml_ext_fold_place          fold;
};

struct ggml_ext_graph_table {
    std::vector<ggml_ext_observed>                               sites;
    std::vector<ggml_ext_value>                                  values;
    std::unordered_map<const ggml_tensor *, std::vector<size_t>> at;      // node -> values
    std::vector<std::pair<std::string, std::string>>             others;  // weight -> how it is used
};

// The weights and inputs for which ggml_ext_llama_input was asked while the graph was built.
using ggml_ext_online = std::set<std::pair<const ggml_tensor *, const ggml_tensor *>>;

ggml_ext_graph_table ggml_ext_walk(const llama_model & model, ggml_cgraph * gf, const ggml_ext_online & online);

std::string ggml_ext_table_json(const ggml_ext_graph_table & table);

// The activation behind reshapes, copies and views of all of it: its elements in the same order.
const ggml_tensor * ggml_ext_origin(const ggml_tensor * x);
