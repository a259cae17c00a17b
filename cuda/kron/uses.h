// Who reads the result of a GGML_EXT_OP_KRON node, found in the graph before the node runs.

#pragma once

#include "core/ext_op.h"
#include "fq4/mul_mat_match.h"
#include "ggml-impl.h"
#include "hooks/ggml-ext-hooks.h"

#include <algorithm>

struct ggml_ext_kron_uses {
    int n_products;  // with FQ4 weights (FQ4_64 has other groups), that read it as src[1] before anything else is quantised for a product
    bool no_others;  // nothing else reads it, in this graph or in another split of the same graph
};

inline ggml_ext_kron_uses ggml_ext_kron_uses_of(const ggml_cgraph * graph, int i) {
    constexpr int       reach   = 256;  // nodes; the products of one input lie close together
    const ggml_tensor * node    = graph->nodes[i];
    const bool          output  = node->flags & GGML_TENSOR_FLAG_OUTPUT;
    const int           n_uses  = ggml_node_get_use_count(graph, i);
    int                 n_found = 0;
    for (int j = i + 1; j < std::min(graph->n_nodes, i + reach) && n_found < n_uses; j++) {
        const ggml_tensor * reader  = graph->nodes[j];
        const bool          product = (reader->op == GGML_OP_MUL_MAT || reader->op == GGML_OP_MUL_MAT_ID) &&
                             ggml_ext_fq4_has_kernels(reader->src[0]->type);
        if (product && reader->src[1] == node && reader->src[0]->type == GGML_TYPE_FQ4) {
            n_found++;
        } else if (product || (reader->op == GGML_OP_EXT && ggml_ext_get_op(reader) == GGML_EXT_OP_KRON)) {
            break;
        }
    }
    return { n_found, n_found > 0 && n_found == n_uses && !output };
}
