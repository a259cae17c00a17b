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

// What some matrices read: the values that share a reader. n: length of a row. n_experts: matrices that each get a part of
// the rows, by MUL_MAT_ID's ids or by index (one matrix per head, say); 0 for a matrix that gets all.
struct ggml_ext_observed {
    std::string                  anchor;
    int64_t                      n         = 0;
    int64_t                      n_experts = 0;
    std::vector<ggml_ext_reader> readers;
    std::vector<std::string>     values;
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
