// Folds follow from the graph alone. A fold is exact if what it changes reaches the site's matrices and nothing else, and
// if every step between is linear in it, channel by channel. So each function here walks back from a site's input, and
// throws the reason where a step is not known to be so.

#include "folds.h"

#include <algorithm>
#include <set>
#include <stdexcept>
#include <vector>

namespace {

using node_t = const ggml_tensor *;

struct no_fold : std::runtime_error {
    using std::runtime_error::runtime_error;
};

bool is_view(node_t t) {
    return t->op == GGML_OP_VIEW || t->op == GGML_OP_RESHAPE || t->op == GGML_OP_PERMUTE || t->op == GGML_OP_TRANSPOSE;
}

bool is_product(node_t t) {
    return t->op == GGML_OP_MUL_MAT || t->op == GGML_OP_MUL_MAT_ID;
}

node_t base(node_t t) {
    return t->view_src ? t->view_src : t;
}

class finder {
  public:
    finder(ggml_cgraph * gf, const std::map<node_t, std::string> & weights, ggml_ext_graph_table & table) :
        weights(weights), table(table) {
        for (int i = 0; i < ggml_graph_n_nodes(gf); i++) {
            node_t node = ggml_graph_node(gf, i);
            for (int s = 0; s < GGML_MAX_SRC; s++) {
                node_t source = node->src[s];
                if (!source || source == node) {  // a cast names itself
                    continue;
                }
                consumers[source].push_back(node);
                if (!is_view(node)) {
                    readers[base(source)].insert(node);
                }
            }
            if (!is_view(node) && node->view_src) {
                writers[base(node)].push_back(node);
            }
        }
    }

    void find(size_t site) {
        ggml_ext_fold_place & fold = table.sites[site].fold;
        try {
            std::vector<node_t> products;
            for (const ggml_ext_value & value : table.values) {
                if (value.site == site) {
                    products.push_back(value.product);
                }
            }
            if (products.size() != 1) {
                throw no_fold("its matrices read several activations");
            }
            node_t x = ggml_ext_origin(products[0]->src[1]);
            require_owned(x, site);
            fold = made_by(x, products[0]->src[1]->ne[0]);
        } catch (const no_fold & reason) {
            fold        = {};
            fold.reason = reason.what();
        }
    }

  private:
    std::string name_of(node_t weight) const { return weights.at(base(weight)); }

    bool is_weight(node_t t) const { return weights.count(base(t)) != 0; }

    bool is_vector(node_t t, int64_t n) const { return is_weight(t) && t->ne[0] == n && ggml_nelements(t) == n; }

    // Whatever x reaches before a step that mixes channels is a product of this site's matrices.
    void require_owned(node_t x, size_t site) const {
        if (x->flags & GGML_TENSOR_FLAG_OUTPUT) {
            throw no_fold("its input is an output of the graph");
        }
        const auto found = consumers.find(x);
        if (found == consumers.end()) {
            return;
        }
        for (node_t c : found->second) {
            const bool transparent =
                ggml_ext_origin(c) == ggml_ext_origin(x) || (c->op == GGML_OP_GET_ROWS && c->src[0] == x) ||
                (c->op == GGML_OP_REPEAT && c->ne[0] == x->ne[0]) ||
                (c->op == GGML_OP_MUL && c->src[0] == x && c->src[1]->ne[0] == 1 && !is_weight(c->src[1]));
            if (transparent) {
                require_owned(c, site);
            } else if (!is_product(c) || c->src[1] != x || !is_weight(c->src[0])) {
                throw no_fold(std::string(ggml_op_name(c->op)) + " reads its input too");
            } else {
                require_same_site(c, site);
            }
        }
    }

    void require_same_site(node_t product, size_t site) const {
        const std::string name = name_of(product->src[0]);
        for (const ggml_ext_reader & reader : table.sites[site].readers) {
            if (reader.weight == name) {
                return;
            }
        }
        throw no_fold("its input is made together with that of " + name);
    }

    void require_only(node_t t, node_t consumer) const {
        for (node_t c : consumers.at(t)) {
            if (c != consumer) {
                throw no_fold(std::string(ggml_op_name(c->op)) + " reads what makes its input too");
            }
        }
        if (t->flags & GGML_TENSOR_FLAG_OUTPUT) {
            throw no_fold("what makes its input is an output of the graph");
        }
    }

    void require_one_reader(node_t weight) const {
        if (readers.at(base(weight)).size() != 1) {
            throw no_fold(name_of(weight) + " is read several times");
        }
    }

    ggml_ext_fold_place made_by(node_t x, int64_t n) const {
        if (x->op == GGML_OP_ADD && is_vector(x->src[1], n) && x->src[0]->op == GGML_OP_MUL &&
            is_weight(x->src[0]->src[1])) {
            require_only(x->src[0], x);
            ggml_ext_fold_place fold = gain(x->src[0], n);
            require_one_reader(x->src[1]);
            fold.bias = name_of(x->src[1]);
            return fold;
        }
        if (x->op == GGML_OP_MUL && is_weight(x->src[1])) {
            return gain(x, n);
        }
        if (x->op == GGML_OP_GLU) {
            return gated(x, n);
        }
        if (ggml_ext_fold_place fold; attention(x, n, fold)) {
            return fold;
        }
        if (x->op == GGML_OP_MUL) {
            return multiplied(x, n);
        }
        return rows(x, n);
    }

    ggml_ext_fold_place gain(node_t mul, int64_t n) const {
        if (!is_vector(mul->src[1], n)) {
            throw no_fold("its gain " + name_of(mul->src[1]) + " is shorter than its input");
        }
        require_one_reader(mul->src[1]);
        ggml_ext_fold_place fold;
        fold.kind   = "gain";
        fold.tensor = name_of(mul->src[1]);
        fold.n      = n;
        return fold;
    }

    ggml_ext_fold_place gated(node_t glu, int64_t n) const {
        const ggml_glu_op op = ggml_get_glu_op(glu);
        if (op != GGML_GLU_OP_REGLU && op != GGML_GLU_OP_GEGLU && op != GGML_GLU_OP_SWIGLU &&
            op != GGML_GLU_OP_GEGLU_ERF && op != GGML_GLU_OP_GEGLU_QUICK) {
            throw no_fold(std::string(ggml_glu_op_name(op)) + " is not linear in one of its inputs");
        }
        if (glu->src[1]) {
            require_only(glu->src[1], glu);
            return rows(glu->src[1], n);
        }
        // Both halves in one: without `swapped` the first one is activated, and the second is linear.
        require_only(glu->src[0], glu);
        const bool swapped = glu->op_params[1] != 0;
        return rows(glu->src[0], n, swapped ? 0 : n);
    }

    // a * b, element by element: linear in either, so the one that a matrix makes takes the fold.
    ggml_ext_fold_place multiplied(node_t mul, int64_t n) const {
        std::string reason;
        for (const int i : { 1, 0 }) {
            if (mul->src[i]->ne[0] != n || !ggml_are_same_shape(mul->src[i], mul)) {
                continue;
            }
            try {
                require_only(mul->src[i], mul);
                return rows(mul->src[i], n);
            } catch (const no_fold & why) {
                reason = why.what();
            }
        }
        throw no_fold(reason.empty() ? "it is a product of activations" : reason);
    }

    // The matrix whose output rows are t, through biases, scales and views. first: of the rows of t that are meant.
    ggml_ext_fold_place rows(node_t t, int64_t n, int64_t first = 0) const {
        ggml_ext_fold_place fold;
        fold.kind = "rows";
        fold.n    = n;
        for (;;) {
            node_t up = nullptr;
            if (t->op == GGML_OP_RESHAPE || t->op == GGML_OP_CONT || t->op == GGML_OP_TRANSPOSE ||
                ggml_ext_origin(t) != t) {
                up = t->src[0];
            } else if (t->op == GGML_OP_VIEW) {
                for (node_t view = t; view->src[0] != t->view_src; view = view->src[0]) {
                    require_only(view->src[0], view);
                }
                first += part(t, n);
                t = t->view_src;
                require_apart(t, first, n);
                continue;
            } else if (t->op == GGML_OP_SCALE && t->op_params[1] == 0) {
                up = t->src[0];
            } else if ((t->op == GGML_OP_ADD && is_weight(t->src[1]) &&
                        ggml_nelements(t->src[1]) == t->src[1]->ne[0]) ||
                       (t->op == GGML_OP_ADD_ID && is_weight(t->src[1]))) {
                if (!fold.bias.empty()) {
                    throw no_fold("two biases");
                }
                require_one_reader(t->src[1]);
                fold.bias = name_of(t->src[1]);
                up        = t->src[0];
            } else if (t->op == GGML_OP_MUL && t->src[1]->ne[0] == 1) {
                up = t->src[0];
            } else if (t->op == GGML_OP_PERMUTE && first == 0 && is_stacked(t, n)) {
                require_only(t->src[0], t);
                return made_by_product(fold, t->src[0], 0, /*stacked =*/true);
            } else if (is_product(t) && is_weight(t->src[0])) {
                return made_by_product(fold, t, first);
            } else {
                throw no_fold(t->op == GGML_OP_NONE ? "its input comes from outside the block" :
                                                      std::string(ggml_op_desc(t)) + " makes its input");
            }
            require_only(up, t);
            t = up;
        }
    }

    // Whether the n channels are what a stack of matrices makes, one after the other: [rows, tokens, matrices] permuted.
    bool is_stacked(node_t t, int64_t n) const {
        node_t product = t->src[0];
        return t->op_params[0] == 0 && t->op_params[1] == 2 && t->op_params[2] == 1 && product->op == GGML_OP_MUL_MAT &&
               is_weight(product->src[0]) && product->ne[0] * product->ne[2] == n &&
               product->src[0]->ne[2] == product->ne[2];
    }

    ggml_ext_fold_place made_by_product(ggml_ext_fold_place fold, node_t product, int64_t first,
                                        bool stacked = false) const {
        node_t w = product->src[0];
        while (w->op == GGML_OP_RESHAPE) {
            w = w->src[0];
        }
        if (w->op != GGML_OP_NONE) {
            throw no_fold("a part of " + name_of(w) + " makes its input");
        }
        require_one_reader(w);
        fold.tensor = name_of(w);
        fold.first  = first;
        if (first + fold.n > w->ne[1] * (stacked ? w->ne[2] : 1)) {
            throw no_fold("several matrices of " + name_of(w) + " make its input");
        }
        return fold;
    }

    // The first of n adjacent channels of each token that a view takes.
    static int64_t part(node_t view, int64_t n) {
        node_t        of    = view->view_src;
        const int64_t from  = int64_t(view->view_offs / sizeof(float));
        const bool    flat  = view->ne[0] == n && view->nb[1] == of->nb[1];
        const bool    heads = view->ne[0] * view->ne[1] == n && view->nb[1] == view->ne[0] * view->nb[0] &&
                           (view->nb[2] == of->nb[1] || of->ne[1] == 1);
        if (view->nb[0] != sizeof(float) || from + n > of->ne[0] || !(flat || heads)) {
            throw no_fold("a view of another layout makes its input");
        }
        return from;
    }

    // Everything else that reads t takes other channels.
    void require_apart(node_t t, int64_t first, int64_t n) const {
        if (t->flags & GGML_TENSOR_FLAG_OUTPUT) {
            throw no_fold("what makes its input is an output of the graph");
        }
        size_t same = 0;
        for (node_t c : consumers.at(t)) {
            const int64_t width = c->op == GGML_OP_VIEW ? (c->nb[2] == t->nb[1] ? c->ne[0] * c->ne[1] : c->ne[0]) : 0;
            const int64_t from  = (int64_t(c->view_offs) - int64_t(t->view_offs)) / int64_t(sizeof(float));
            if (width == 0 || (from < first + n && first < from + width && (from != first || ++same > 1))) {
                throw no_fold(std::string(ggml_op_name(c->op)) + " reads what makes its input too");
            }
        }
    }

    // Whether x is what attention gives; then `fold` is that of v.
    bool attention(node_t x, int64_t n, ggml_ext_fold_place & fold) const {
        if (!is_attention(x)) {
            return false;
        }
        bool   mixes = true;
        node_t t     = x;
        while (t->op != GGML_OP_FLASH_ATTN_EXT && !is_weighted_sum(t)) {
            node_t up = t->src[0];
            if (t->op == GGML_OP_MUL) {
                const int side = is_attention(t->src[0]) ? 0 : 1;
                up             = t->src[side];
                mixes          = mixes && t->src[1 - side]->ne[0] == 1;
            }
            require_only(up, t);
            t = up;
        }
        fold             = of_values(t->op == GGML_OP_FLASH_ATTN_EXT ? t->src[2] : t->src[0], t, n);
        fold.kind        = "heads";
        fold.head_dim    = t->ne[0];
        fold.n_head      = n / t->ne[0];
        fold.n_head_kv   = fold.n / t->ne[0];
        fold.mixes_heads = mixes;
        if (fold.n_head_kv == 0 || fold.n_head % fold.n_head_kv != 0 || fold.n_head * t->ne[0] != n ||
            fold.n_head_kv * t->ne[0] != fold.n) {
            throw no_fold("attention of another shape makes its input");
        }
        return true;
    }

    // v times probabilities, without flash attention.
    bool is_weighted_sum(node_t t) const {
        return t->op == GGML_OP_MUL_MAT && !is_weight(t->src[0]) && ggml_ext_origin(t->src[1])->op == GGML_OP_SOFT_MAX;
    }

    bool is_attention(node_t t) const {
        while (t->op == GGML_OP_RESHAPE || t->op == GGML_OP_CONT || t->op == GGML_OP_PERMUTE ||
               t->op == GGML_OP_TRANSPOSE || t->op == GGML_OP_MUL || ggml_ext_origin(t) != t) {
            if (t->op == GGML_OP_MUL) {
                return is_attention(t->src[0]) || is_attention(t->src[1]);
            }
            t = t->src[0];
        }
        return t->op == GGML_OP_FLASH_ATTN_EXT || is_weighted_sum(t);
    }

    // v, directly or through the cache: then what is written there, once, and read by this attention alone.
    ggml_ext_fold_place of_values(node_t v, node_t attention, int64_t n) const {
        node_t last = v;
        while (is_view(last)) {
            last = last->src[0];
        }
        node_t t     = last->op == GGML_OP_CONT ? last->src[0] : last;
        node_t cache = base(t);
        node_t made  = v;
        if (cache->op == GGML_OP_NONE && !is_weight(cache)) {
            const auto written = writers.find(cache);
            if (written == writers.end() || written->second.size() != 1) {
                throw no_fold("its values come from the cache of another layer");
            }
            node_t writer = written->second[0];
            if (writer->op != GGML_OP_SET_ROWS && writer->op != GGML_OP_CPY) {
                throw no_fold(std::string(ggml_op_name(writer->op)) + " writes its values");
            }
            for (node_t reader : readers.at(cache)) {
                if (reader != writer && reader != attention && reader != last) {
                    throw no_fold("several products read its values");
                }
            }
            made = writer->src[0];
            require_only(made, writer);
        } else {
            require_only(v, attention);
            while (made->op == GGML_OP_PERMUTE || made->op == GGML_OP_TRANSPOSE || made->op == GGML_OP_CONT ||
                   made->op == GGML_OP_CPY) {
                require_only(made->src[0], made);
                made = made->src[0];
            }
        }
        const int64_t n_tokens = ggml_nelements(attention) / n;
        return rows(made, ggml_nelements(made) / n_tokens);
    }

    const std::map<node_t, std::string> & weights;
    ggml_ext_graph_table &                table;
    std::map<node_t, std::vector<node_t>> consumers;  // of a tensor itself, views included
    std::map<node_t, std::set<node_t>>    readers;    // of a tensor or any view of it, views left out
    std::map<node_t, std::vector<node_t>> writers;    // nodes that write into a tensor
};

}  // namespace

void ggml_ext_find_folds(ggml_cgraph * gf, const std::map<const ggml_tensor *, std::string> & weights,
                         ggml_ext_graph_table & table) {
    finder its(gf, weights, table);
    for (size_t site = 0; site < table.sites.size(); site++) {
        its.find(site);
    }
}
