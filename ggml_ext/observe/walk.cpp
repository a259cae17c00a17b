// The walk over a graph as it was built: before the scheduler splits it, replaces inputs by copies and renames weights.

#include "walk.h"

#include "folds.h"
#include "llama-model.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <optional>
#include <tuple>

namespace {

using node_t = const ggml_tensor *;

bool is_product(node_t node) {
    return node->op == GGML_OP_MUL_MAT || node->op == GGML_OP_MUL_MAT_ID;
}

bool is_view(node_t node) {
    return node->op == GGML_OP_VIEW || node->op == GGML_OP_RESHAPE || node->op == GGML_OP_PERMUTE ||
           node->op == GGML_OP_TRANSPOSE;
}

bool is_copy(node_t node) {
    return node->op == GGML_OP_CONT || node->op == GGML_OP_CPY;
}

// What views and copies come from.
node_t copied(node_t x) {
    for (;;) {
        if (x->view_src && !is_copy(x)) {
            x = x->view_src;
        } else if (is_copy(x)) {
            x = x->src[0];
        } else {
            return x;
        }
    }
}

// A weight, or all of it behind a reshape; null for anything else, a part of a weight included.
node_t whole_weight(node_t w, const std::map<node_t, std::string> & weights) {
    while (w->op == GGML_OP_RESHAPE) {
        w = w->src[0];
    }
    return weights.count(w) ? w : nullptr;
}

// Experts read [n, slots, tokens], matrices by index [n, tokens, matrices], others all rows.
int64_t rows_per_token(node_t product) {
    const ggml_tensor * x = product->src[1];
    return product->op == GGML_OP_MUL_MAT_ID ? x->ne[1] : product->src[0]->ne[2] > 1 ? x->ne[2] : 1;
}

int64_t n_experts(node_t product) {
    const int64_t n = product->src[0]->ne[2];
    return product->op == GGML_OP_MUL_MAT_ID || n > 1 ? n : 0;
}

// What makes two products read one activation: the rows, their length, and how they are dealt out to experts.
struct key {
    node_t  x;
    int64_t n;
    node_t  ids;      // null: every row goes to every matrix, or by index
    int64_t n_heads;  // matrices by index, 0 for none

    bool operator<(const key & other) const {
        return std::tie(x, n, ids, n_heads) < std::tie(other.x, other.n, other.ids, other.n_heads);
    }
};

class walker {
  public:
    walker(const llama_model & model, ggml_cgraph * gf, const ggml_ext_online & online) : online(online) {
        for (const auto & [name, tensor] : llama_internal_get_tensor_map(&model)) {
            weights.emplace(tensor, name);
        }
        for (int i = 0; i < ggml_graph_n_nodes(gf); i++) {
            visit(ggml_graph_node(gf, i));
        }
        join_routed();
        join_weights();
        number();
        ggml_ext_find_folds(gf, weights, table);
    }

    ggml_ext_graph_table table;

  private:
    void visit(node_t node) {
        for (int i = 0; i < GGML_MAX_SRC; i++) {
            if (!node->src[i] || is_view(node) || is_copy(node)) {
                continue;
            }
            const auto found = weights.find(copied(node->src[i]));
            if (found == weights.end()) {
                continue;
            }
            if (i == 0 && is_product(node) && whole_weight(node->src[0], weights)) {
                if (node->src[1]->type == GGML_TYPE_F32) {
                    add(node, found->second);
                } else {
                    uses[found->second].insert(std::string(ggml_op_name(node->op)) + " of " +
                                               ggml_type_name(node->src[1]->type));
                }
            } else {
                const bool part = i == 0 && is_product(node);
                uses[found->second].insert(std::string(ggml_op_name(node->op)) + (part ? " of a part" : ""));
            }
        }
    }

    void add(node_t product, const std::string & weight) {
        node_t        x   = product->src[1];
        const bool    id  = product->op == GGML_OP_MUL_MAT_ID;
        const int64_t n   = product->src[0]->ne[2];
        const key     its = { ggml_ext_origin(x), x->ne[0], id ? ggml_ext_origin(product->src[2]) : nullptr,
                          id || n == 1 ? 0 : n };
        size_t        at  = found.size();
        if (const auto known = index.find(its); known != index.end()) {
            at = known->second;
        } else {
            index.emplace(its, at);
            found.push_back({ product, {} });
        }
        const bool through = online.count({ whole_weight(product->src[0], weights), x }) != 0;
        found[at].readers.push_back({ weight, product->op, through });
    }

    // The experts' rows are those that routers and shared experts read too, if all tokens have one row: one value, unless
    // two sets of experts read it.
    void join_routed() {
        std::map<std::pair<node_t, int64_t>, std::vector<size_t>> routed;
        for (const auto & [its, at] : index) {
            if (its.ids && found[at].product->src[1]->ne[1] == 1) {
                routed[{ its.x, its.n }].push_back(at);
            }
        }
        for (const auto & [x, its] : routed) {
            const auto dense = index.find({ x.first, x.second, nullptr, 0 });
            if (dense == index.end() || its.size() > 1) {
                continue;
            }
            auto & into = found[its[0]].readers;
            auto & from = found[dense->second].readers;
            into.insert(into.end(), from.begin(), from.end());
            from.clear();
        }
    }

    // Values that share a reader, as in loops over one block, are one site.
    void join_weights() {
        site_of.resize(found.size());
        std::iota(site_of.begin(), site_of.end(), size_t(0));
        std::map<std::string, size_t> first;
        for (size_t i = 0; i < found.size(); i++) {
            for (const ggml_ext_reader & reader : found[i].readers) {
                const auto [known, fresh] = first.emplace(reader.weight, i);
                if (!fresh) {
                    unite(known->second, i);
                }
            }
        }
    }

    size_t root(size_t i) const { return site_of[i] == i ? i : root(site_of[i]); }

    void unite(size_t a, size_t b) {
        a                       = root(a);
        b                       = root(b);
        site_of[std::max(a, b)] = std::min(a, b);
    }

    // A finished graph is evaluated up to a node. Where the activation is computed by a node of its own, that is the one:
    // the head then need not be computed. The ids of experts are there with the product only.
    static node_t seen_at(node_t product) {
        node_t x = product->src[1];
        return product->op == GGML_OP_MUL_MAT_ID || is_view(x) || x->op == GGML_OP_NONE ? product : x;
    }

    void number() {
        std::map<size_t, size_t> sites;
        for (size_t i = 0; i < found.size(); i++) {
            if (found[i].readers.empty()) {
                continue;
            }
            node_t product          = found[i].product;
            const auto [its, fresh] = sites.emplace(root(i), table.sites.size());
            if (fresh) {
                table.sites.emplace_back();
            }
            ggml_ext_observed & site = table.sites[its->second];
            site.n                   = product->src[1]->ne[0];
            site.n_experts           = std::max(site.n_experts, n_experts(product));
            add_readers(site, found[i].readers);
            site.values.push_back(product->src[1]->name);
            site.rows = std::max(site.rows, rows_per_token(product));
            if (site.anchor.empty()) {
                site.anchor = without_suffix(site.readers[0].weight);
            }
            node_t at = seen_at(product);
            table.at[at].push_back(table.values.size());
            table.values.push_back({ at, product, its->second });
        }
        std::set<std::string> read;
        for (const ggml_ext_observed & site : table.sites) {
            for (const ggml_ext_reader & reader : site.readers) {
                read.insert(reader.weight);
            }
        }
        for (const auto & [tensor, name] : weights) {
            if (!read.count(name)) {
                table.others.emplace_back(name, use_of(name));
            }
        }
        std::sort(table.others.begin(), table.others.end());
        table.others.erase(std::unique(table.others.begin(), table.others.end()), table.others.end());
    }

    static void add_readers(ggml_ext_observed & site, const std::vector<ggml_ext_reader> & readers) {
        for (const ggml_ext_reader & reader : readers) {
            const auto same = [&](const ggml_ext_reader & other) { return other.weight == reader.weight; };
            const auto it   = std::find_if(site.readers.begin(), site.readers.end(), same);
            if (it == site.readers.end()) {
                site.readers.push_back(reader);
            } else {
                it->online = it->online && reader.online;
            }
        }
    }

    static std::string without_suffix(const std::string & name) {
        const std::string suffix = ".weight";
        const bool        has =
            name.size() > suffix.size() && name.compare(name.size() - suffix.size(), suffix.size(), suffix) == 0;
        return has ? name.substr(0, name.size() - suffix.size()) : name;
    }

    std::string use_of(const std::string & name) const {
        const auto its = uses.find(name);
        if (its == uses.end()) {
            return "never";
        }
        std::string text;
        for (const std::string & use : its->second) {
            text += (text.empty() ? "" : ", ") + use;
        }
        return text;
    }

    struct value {
        node_t                       product;
        std::vector<ggml_ext_reader> readers;
    };

    const ggml_ext_online &                      online;
    std::map<node_t, std::string>                weights;
    std::map<key, size_t>                        index;
    std::vector<value>                           found;
    std::vector<size_t>                          site_of;
    std::map<std::string, std::set<std::string>> uses;  // of weights, other than products with activations
};

std::string quoted(const std::string & text) {
    std::string out = "\"";
    for (const char c : text) {
        if (c == '"' || c == '\\') {
            out += '\\';
            out += c;
        } else if (static_cast<unsigned char>(c) < 0x20) {
            char code[8];
            snprintf(code, sizeof(code), "\\u%04x", c);
            out += code;
        } else {
            out += c;
        }
    }
    return out + '"';
}

template <typename T, typename F> std::string list(const std::vector<T> & items, F text) {
    std::string out = "[";
    for (const T & item : items) {
        out += (out.size() > 1 ? "," : "") + text(item);
    }
    return out + "]";
}

}  // namespace

const ggml_tensor * ggml_ext_origin(const ggml_tensor * x) {
    for (;;) {
        const bool same = x->op == GGML_OP_RESHAPE || (x->op == GGML_OP_CONT && ggml_is_contiguous(x->src[0])) ||
                          (x->op == GGML_OP_VIEW && x->view_offs == x->src[0]->view_offs && ggml_is_contiguous(x) &&
                           ggml_is_contiguous(x->src[0]) && ggml_nelements(x) == ggml_nelements(x->src[0]));
        if (!same) {
            return x;
        }
        x = x->src[0];
    }
}

ggml_ext_graph_table ggml_ext_walk(const llama_model & model, ggml_cgraph * gf, const ggml_ext_online & online) {
    return walker(model, gf, online).table;
}

std::string ggml_ext_table_json(const ggml_ext_graph_table & table) {
    const auto reader = [](const ggml_ext_reader & its) {
        return "{\"tensor\":" + quoted(its.weight) + ",\"op\":" + quoted(ggml_op_name(its.op)) +
               ",\"online\":" + (its.online ? "true" : "false") + "}";
    };
    const auto fold = [](const ggml_ext_fold_place & its) {
        if (its.kind.empty()) {
            return "{\"reason\":" + quoted(its.reason) + "}";
        }
        std::string text = "{\"kind\":" + quoted(its.kind) + ",\"tensor\":" + quoted(its.tensor) +
                           ",\"bias\":" + quoted(its.bias) + ",\"first\":" + std::to_string(its.first) +
                           ",\"n\":" + std::to_string(its.n);
        if (its.head_dim) {
            text += ",\"n_head\":" + std::to_string(its.n_head) + ",\"n_head_kv\":" + std::to_string(its.n_head_kv) +
                    ",\"head_dim\":" + std::to_string(its.head_dim) +
                    ",\"mixes_heads\":" + (its.mixes_heads ? "true" : "false");
        }
        return text + "}";
    };
    const auto site = [&](const ggml_ext_observed & its) {
        return "{\"anchor\":" + quoted(its.anchor) + ",\"n\":" + std::to_string(its.n) +
               ",\"experts\":" + std::to_string(its.n_experts) + ",\"rows\":" + std::to_string(its.rows) +
               ",\"readers\":" + list(its.readers, reader) + ",\"values\":" + list(its.values, quoted) +
               ",\"fold\":" + fold(its.fold) + "}";
    };
    const auto other = [](const std::pair<std::string, std::string> & its) {
        return "{\"tensor\":" + quoted(its.first) + ",\"use\":" + quoted(its.second) + "}";
    };
    return "{\"sites\":" + list(table.sites, site) + ",\"others\":" + list(table.others, other) + "}";
}
