// The state behind ggml_ext_observer_*, whose functions ggml-ext.h documents.

#pragma once

#include "ggml-ext.h"
#include "moments.h"
#include "walk.h"

#include <cstdint>
#include <string>
#include <vector>

struct ggml_ext_observer {
    explicit ggml_ext_observer(int n_threads);

    // Takes the place of the last graph's table. Called by the thread that builds the graph.
    void walk(const llama_model & model, ggml_cgraph * gf, const ggml_ext_online & online);

    bool    wants(const ggml_tensor * node) const;
    void    see(const ggml_tensor * node);
    void    fail(int32_t code, size_t site);
    int64_t n_wanted() const;

    std::vector<std::string> anchors() const;

    ggml_ext_summer      summer;
    ggml_ext_graph_table table;
    std::string          json;

    std::vector<ggml_ext_site_sums> sums;           // one per site of the table
    std::vector<std::string>        agreed;         // the sites that they were given for
    bool                            stale = false;  // the graph has others

    std::vector<bool> touched;                      // sites of this decode
    int64_t           first_token = 0;
    int64_t           n_tokens    = 0;
    float             largest     = 0;
    const float *     weights     = nullptr;
    int64_t           n_seen      = 0;  // values
    int32_t           error       = 0;
    std::string       culprit;

  private:
    void add(const ggml_ext_value & value, const ggml_tensor * node);
    bool keep_sample(const ggml_ext_site_sums & into, const ggml_ext_rows & x) const;
};
