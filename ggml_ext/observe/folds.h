// Where the offline part of a site's transform can go: a gain, or rows of the matrix that makes the site's channels.

#pragma once

#include "walk.h"

#include <map>
#include <string>

// Finds the fold of every site of the table, or the reason that there is none.
// weights: those of the model, by tensor.
void ggml_ext_find_folds(ggml_cgraph * gf, const std::map<const ggml_tensor *, std::string> & weights,
                         ggml_ext_graph_table & table);
