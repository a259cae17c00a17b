// Which products of FQ4 and FQ4_64 weights the CUDA kernels take, and which runs of graph nodes they take at once. Host code that
// needs no device, so that a test on a CPU can show it graphs.

#pragma once

#include "ggml-impl.h"
#include "ggml.h"

struct ggml_ext_fq4_fusion {
    int                 following;  // nodes after the first one; 0: nothing to fuse
    const ggml_tensor * product;    // the only one, or the one that is not under the gate's function
    const ggml_tensor * gate;       // or NULL
    const ggml_tensor * bias;       // of product, or NULL
    const ggml_tensor * gate_bias;  // or NULL
    ggml_tensor *       dst;
};

inline bool ggml_ext_fq4_has_kernels(ggml_type type) {
    return type == GGML_TYPE_FQ4 || type == GGML_TYPE_FQ4_64;
}

// MUL_MAT and MUL_MAT_ID of such weights whose rows are whole blocks one after the other. Row sizes stay below what the
// kernels' 32-bit offsets inside a group of rows can hold.
inline bool ggml_ext_fq4_is_product(const ggml_tensor * op) {
    if (op->op != GGML_OP_MUL_MAT && op->op != GGML_OP_MUL_MAT_ID) {
        return false;
    }
    const ggml_tensor * x = op->src[0];
    const ggml_tensor * y = op->src[1];
    return ggml_ext_fq4_has_kernels(x->type) && x->nb[0] == ggml_type_size(x->type) && x->nb[1] < (1u << 29) &&
           ggml_row_size(x->type, x->ne[0]) < (1u << 29) && x->ne[1] < (1 << 30) && ggml_nrows(y) < (1 << 30) &&
           y->type == GGML_TYPE_F32 && y->nb[0] == sizeof(float) && op->type == GGML_TYPE_F32 &&
           op->nb[0] == sizeof(float) && (op->op == GGML_OP_MUL_MAT || op->src[2]->type == GGML_TYPE_I32);
}

namespace ggml_ext {

// One column per matrix, or few tokens, each expert's product being computed alone.
inline bool fq4_is_single(const ggml_tensor * product) {
    return ggml_ext_fq4_is_product(product) &&
           product->ne[product->op == GGML_OP_MUL_MAT ? 1 : 2] <= (product->op == GGML_OP_MUL_MAT ? 1 : 8);
}

// What `node` adds to `product`, where the kernel can do it: a value per element, or per row and expert.
inline const ggml_tensor * fq4_bias(const ggml_tensor * node, const ggml_tensor * product) {
    const ggml_tensor * bias = nullptr;
    if (node->op == GGML_OP_ADD && product->op == GGML_OP_MUL_MAT) {
        bias = node->src[0] == product ? node->src[1] : node->src[1] == product ? node->src[0] : nullptr;
        bias = bias && bias != product && ggml_are_same_shape(bias, product) ? bias : nullptr;
    } else if (node->op == GGML_OP_ADD_ID && product->op == GGML_OP_MUL_MAT_ID) {
        bias = node->src[0] == product && node->src[2] == product->src[2] ? node->src[1] : nullptr;
        bias = bias && bias->ne[0] == product->ne[0] ? bias : nullptr;
    }
    const bool good = bias && bias->type == GGML_TYPE_F32 && bias->nb[0] == sizeof(float) &&
                      node->type == GGML_TYPE_F32 && node->nb[0] == sizeof(float);
    return good ? bias : nullptr;
}

inline bool fq4_is_glu(const ggml_tensor * node) {
    if (node->op != GGML_OP_GLU || !node->src[1] || ggml_get_op_params_i32(node, 1) != 0 /* swapped */ ||
        node->type != GGML_TYPE_F32 || node->nb[0] != sizeof(float)) {
        return false;
    }
    const ggml_glu_op op = ggml_get_glu_op(node);
    return op == GGML_GLU_OP_SWIGLU || op == GGML_GLU_OP_GEGLU || op == GGML_GLU_OP_SWIGLU_OAI ||
           op == GGML_GLU_OP_SWIGLU_CLAMP;
}

inline bool fq4_are_pair(const ggml_tensor * a, const ggml_tensor * b) {
    return a->op == b->op && a->src[1] == b->src[1] && a->src[2] == b->src[2] &&
           ggml_are_same_shape(a->src[0], b->src[0]) && ggml_are_same_stride(a->src[0], b->src[0]);
}

inline bool fq4_overlap(const ggml_tensor * a, const ggml_tensor * b) {
    const char * a_data = static_cast<const char *>(a->data);
    const char * b_data = static_cast<const char *>(b->data);
    return a_data < b_data + ggml_nbytes(b) && b_data < a_data + ggml_nbytes(a);
}

// Thread blocks write dst while others still read these. (Not src[1]: its int8 form is made before.) An element of a
// bias is read by the thread that writes its sum, so the same layout at the same place is fine.
inline bool fq4_memory_is_free(const ggml_ext_fq4_fusion & f) {
    for (const ggml_tensor * read : { f.bias, f.gate_bias }) {
        const bool in_place =
            read && f.product->op == GGML_OP_MUL_MAT && read->data == f.dst->data && ggml_are_same_stride(read, f.dst);
        if (read && !in_place && fq4_overlap(read, f.dst)) {
            return false;
        }
    }
    return !fq4_overlap(f.product->src[0], f.dst) && !(f.gate && fq4_overlap(f.gate->src[0], f.dst)) &&
           !(f.product->src[2] && fq4_overlap(f.product->src[2], f.dst));
}

// Nodes i .. i + n - 1 with the ops of `ops`, of which only the last one's result is used elsewhere.
inline bool fq4_is_run(const ggml_cgraph * graph, int i, std::initializer_list<ggml_op> ops) {
    return ggml_can_fuse_subgraph(graph, i, ops, { i + int(ops.size()) - 1 });
}

// product, product, GLU, or with a bias after either product. The graph may have the gate first or second.
inline ggml_ext_fq4_fusion fq4_find_glu(const ggml_cgraph * graph, int i, bool with_bias) {
    const ggml_op op      = graph->nodes[i]->op;
    const ggml_op bias_op = op == GGML_OP_MUL_MAT ? GGML_OP_ADD : GGML_OP_ADD_ID;
    if (!(with_bias ? fq4_is_run(graph, i, { op, bias_op, op, bias_op, GGML_OP_GLU }) :
                      fq4_is_run(graph, i, { op, op, GGML_OP_GLU }))) {
        return {};
    }
    const int          step = with_bias ? 2 : 1;
    ggml_tensor *      dst  = graph->nodes[i + 2 * step];
    const ggml_tensor *first[2], *last[2];  // of each lane: the product, and what GLU takes
    for (int lane = 0; lane < 2; lane++) {
        first[lane] = graph->nodes[i + lane * step];
        last[lane]  = graph->nodes[i + lane * step + step - 1];
    }
    const int gate = dst->src[0] == last[0] ? 0 : 1;
    if (!fq4_is_glu(dst) || dst->src[0] != last[gate] || dst->src[1] != last[1 - gate] || !fq4_is_single(first[1]) ||
        !fq4_are_pair(first[0], first[1])) {
        return {};
    }
    ggml_ext_fq4_fusion f = { 2 * step, first[1 - gate], first[gate], nullptr, nullptr, dst };
    if (with_bias) {
        f.bias      = fq4_bias(last[1 - gate], f.product);
        f.gate_bias = fq4_bias(last[gate], f.gate);
        if (!f.bias || !f.gate_bias || !ggml_are_same_stride(f.bias, f.gate_bias)) {
            return {};
        }
        for (const ggml_tensor * node : { first[0], first[1], last[0], last[1] }) {
            if (f.bias == node || f.gate_bias == node) {
                return {};  // never computed on its own
            }
        }
    }
    return f;
}

inline ggml_ext_fq4_fusion fq4_find_bias(const ggml_cgraph * graph, int i) {
    const ggml_tensor * product = graph->nodes[i];
    const ggml_op       bias_op = product->op == GGML_OP_MUL_MAT ? GGML_OP_ADD : GGML_OP_ADD_ID;
    if (!fq4_is_run(graph, i, { product->op, bias_op })) {
        return {};
    }
    ggml_tensor *       dst  = graph->nodes[i + 1];
    const ggml_tensor * bias = fq4_bias(dst, product);
    return bias ? ggml_ext_fq4_fusion{ 1, product, nullptr, bias, nullptr, dst } : ggml_ext_fq4_fusion{};
}

}  // namespace ggml_ext

// Looks from node i on for products of one column (MUL_MAT) or of few tokens (MUL_MAT_ID):
//     product, product, GLU (swiglu, geglu, swiglu_oai, swiglu_clamp); product, bias, product, bias, GLU; product, bias
// where bias is ADD of the product's shape or ADD_ID by the product's ids.
inline ggml_ext_fq4_fusion ggml_ext_fq4_find_fusion(const ggml_cgraph * graph, int i) {
    if (!ggml_ext::fq4_is_single(graph->nodes[i]) || ggml_is_empty(graph->nodes[i])) {
        return {};
    }
    const ggml_ext_fq4_fusion candidates[] = {
        ggml_ext::fq4_find_glu(graph, i, true),
        ggml_ext::fq4_find_glu(graph, i, false),
        ggml_ext::fq4_find_bias(graph, i),
    };
    for (const ggml_ext_fq4_fusion & f : candidates) {
        if (f.following > 0 && ggml_ext::fq4_memory_is_free(f)) {
            return f;
        }
    }
    return {};
}
