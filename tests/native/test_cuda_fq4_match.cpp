// Which graphs of FQ4 products the CUDA backend computes at once: those of the models, and none whose intermediate
// results are wanted, whose shapes differ, or whose result would overwrite what is still read.
//
// Would break it: a dropped condition (each has a graph here that only it refuses), gate and up taken the wrong way
// round, a wrong count of nodes.

#include "check.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"  // static functions of ggml-impl.h
#include "fq4/mul_mat_match.h"
#pragma GCC diagnostic pop

#include <functional>

namespace {

constexpr int64_t K = 512, ROWS = 12, EXPERTS = 4, USED = 2;

struct Graph {
    ggml_context * ctx;
    ggml_cgraph *  graph;
    ggml_tensor *  input;
    ggml_tensor *  ids;

    explicit Graph(bool id, int64_t n_tokens = 1) {
        ctx   = ggml_init({ 4 << 20, nullptr, false });
        graph = ggml_new_graph(ctx);
        input = id ? ggml_new_tensor_3d(ctx, GGML_TYPE_F32, K, 1, n_tokens) :
                     ggml_new_tensor_2d(ctx, GGML_TYPE_F32, K, n_tokens);
        ids   = id ? ggml_new_tensor_2d(ctx, GGML_TYPE_I32, USED, n_tokens) : nullptr;
    }

    Graph(const Graph &) = delete;

    ~Graph() { ggml_free(ctx); }

    ggml_tensor * product(ggml_type type = GGML_TYPE_FQ4, int64_t rows = ROWS) {
        if (ids) {
            return ggml_mul_mat_id(ctx, ggml_new_tensor_3d(ctx, type, K, rows, EXPERTS), input, ids);
        }
        return ggml_mul_mat(ctx, ggml_new_tensor_2d(ctx, type, K, rows), input);
    }

    ggml_tensor * biased(ggml_tensor * x) {
        if (ids) {
            return ggml_add_id(ctx, x, ggml_new_tensor_2d(ctx, GGML_TYPE_F32, ROWS, EXPERTS), ids);
        }
        return ggml_add(ctx, x, ggml_new_tensor_2d(ctx, GGML_TYPE_F32, ROWS, x->ne[1]));
    }

    // Nodes in the order given, whatever a walk over the graph would make of it.
    void build(std::initializer_list<ggml_tensor *> nodes) {
        for (ggml_tensor * node : nodes) {
            ggml_build_forward_expand(graph, node);
        }
    }

    ggml_ext_fq4_fusion find() const { return ggml_ext_fq4_find_fusion(graph, 0); }
};

void check_glu() {
    for (bool id : { false, true }) {
        for (bool bias : { false, true }) {
            for (bool gate_first : { false, true }) {
                Graph         g(id);
                ggml_tensor * a   = g.product();
                ggml_tensor * b   = g.product();
                ggml_tensor * x   = bias ? g.biased(a) : a;
                ggml_tensor * y   = bias ? g.biased(b) : b;
                ggml_tensor * glu = gate_first ? ggml_swiglu_split(g.ctx, x, y) : ggml_swiglu_split(g.ctx, y, x);
                g.build({ x, y, glu });
                const auto f = g.find();
                CHECK(f.following == (bias ? 4 : 2), "id %d, bias %d: %d nodes", id, bias, f.following);
                CHECK(f.gate == (gate_first ? a : b) && f.product == (gate_first ? b : a) && f.dst == glu,
                      "id %d, bias %d, gate first %d: lanes", id, bias, gate_first);
                CHECK(f.bias == (bias ? (gate_first ? y : x)->src[1] : nullptr) &&
                          f.gate_bias == (bias ? (gate_first ? x : y)->src[1] : nullptr),
                      "id %d, bias %d: biases", id, bias);
            }
        }
    }
}

void check_kinds() {
    const std::function<ggml_tensor *(ggml_context *, ggml_tensor *, ggml_tensor *)> kinds[] = {
        [](ggml_context * ctx, ggml_tensor * x, ggml_tensor * y) { return ggml_geglu_split(ctx, x, y); },
        [](ggml_context * ctx, ggml_tensor * x, ggml_tensor * y) { return ggml_swiglu_oai(ctx, x, y, 1.7f, 7.0f); },
        [](ggml_context * ctx, ggml_tensor * x, ggml_tensor * y) { return ggml_swiglu_clamp(ctx, x, y, 7.0f); },
        [](ggml_context * ctx, ggml_tensor * x, ggml_tensor * y) { return ggml_reglu_split(ctx, x, y); },
    };
    for (size_t i = 0; i < 4; i++) {
        Graph         g(false);
        ggml_tensor * a = g.product();
        ggml_tensor * b = g.product();
        g.build({ a, b, kinds[i](g.ctx, a, b) });
        CHECK((g.find().following == 2) == (i < 3), "kind %zu", i);
    }
}

void glu_of(Graph & g, ggml_tensor * a, ggml_tensor * b) {
    g.build({ a, b, ggml_swiglu_split(g.ctx, a, b) });
}

void check_fq4_64() {
    Graph g(false);
    glu_of(g, g.product(GGML_TYPE_FQ4_64), g.product(GGML_TYPE_FQ4_64));
    CHECK(g.find().following == 2, "%d nodes", g.find().following);
}

void check_bias() {
    for (bool id : { false, true }) {
        Graph         g(id, id ? 8 : 1);
        ggml_tensor * a   = g.product();
        ggml_tensor * sum = g.biased(a);
        g.build({ a, sum });
        const auto f = g.find();
        CHECK(f.following == 1 && f.product == a && f.bias == sum->src[1] && !f.gate && f.dst == sum, "id %d", id);
    }
    Graph         g(false);  // the product as the second summand
    ggml_tensor * a   = g.product();
    ggml_tensor * sum = ggml_add(g.ctx, ggml_new_tensor_2d(g.ctx, GGML_TYPE_F32, ROWS, 1), a);
    g.build({ a, sum });
    CHECK(g.find().following == 1 && g.find().bias == sum->src[0], "second summand");
}

// Each graph is one of the above but for one thing.
void refuse(const char * what, bool id, int64_t n_tokens, const std::function<void(Graph &)> & make) {
    Graph g(id, n_tokens);
    make(g);
    CHECK(g.find().following == 0, "%s", what);
}

void check_refusals() {
    refuse("two columns", false, 2, [](Graph & g) { glu_of(g, g.product(), g.product()); });
    refuse("nine tokens", true, 9, [](Graph & g) { glu_of(g, g.product(), g.product()); });
    refuse("another type", false, 1,
           [](Graph & g) { glu_of(g, g.product(GGML_TYPE_Q4_0), g.product(GGML_TYPE_Q4_0)); });
    refuse("another type of one", false, 1, [](Graph & g) { glu_of(g, g.product(), g.product(GGML_TYPE_Q4_0)); });
    refuse("two types with kernels", false, 1, [](Graph & g) { glu_of(g, g.product(), g.product(GGML_TYPE_FQ4_64)); });
    refuse("an intermediate result is an output", false, 1, [](Graph & g) {
        ggml_tensor * a = g.product();
        ggml_set_output(a);
        glu_of(g, a, g.product());
    });
    refuse("an intermediate result is used again", false, 1, [](Graph & g) {
        ggml_tensor * a = g.product();
        glu_of(g, a, g.product());
        g.build({ ggml_sqr(g.ctx, a) });
    });
    refuse("other inputs", false, 1, [](Graph & g) {
        ggml_tensor * a = g.product();
        g.input         = ggml_new_tensor_2d(g.ctx, GGML_TYPE_F32, K, 1);
        glu_of(g, a, g.product());
    });
    refuse("other ids", true, 1, [](Graph & g) {
        ggml_tensor * a = g.product();
        g.ids           = ggml_new_tensor_2d(g.ctx, GGML_TYPE_I32, USED, 1);
        glu_of(g, a, g.product());
    });
    refuse("a bias that is repeated", false, 1, [](Graph & g) {
        ggml_tensor * a = g.product();
        g.build({ a, ggml_add(g.ctx, a, ggml_new_tensor_1d(g.ctx, GGML_TYPE_F32, 1)) });
    });
    refuse("a bias by other ids", true, 1, [](Graph & g) {
        ggml_tensor * a = g.product();
        g.ids           = ggml_new_tensor_2d(g.ctx, GGML_TYPE_I32, USED, 1);
        g.build({ a, g.biased(a) });
    });
    refuse("the product twice", false, 1, [](Graph & g) {
        ggml_tensor * a = g.product();
        g.build({ a, ggml_add(g.ctx, a, a) });
    });
}

// One lane's sum as the other's bias: only the first sum may be fused, for the other one reads it.
void check_sum_as_bias() {
    Graph         g(false);
    ggml_tensor * x = g.biased(g.product());
    ggml_tensor * b = g.product();
    ggml_tensor * y = ggml_add(g.ctx, b, x);
    g.build({ x, b, y, ggml_swiglu_split(g.ctx, x, y) });
    CHECK(g.find().following == 1 && g.find().dst == x, "%d nodes", g.find().following);
}

void check_memory() {
    const auto overlapping = [](const std::function<void(ggml_tensor *, ggml_tensor *, ggml_tensor *)> & move) {
        Graph         g(true);
        ggml_tensor * a   = g.product();
        ggml_tensor * sum = g.biased(a);
        g.build({ a, sum });
        move(a, sum->src[1], sum);
        return g.find().following == 0;
    };
    CHECK(overlapping([](auto *, auto * bias, auto * dst) { dst->data = bias->data; }), "experts' biases");
    CHECK(overlapping([](auto * a, auto *, auto * dst) { dst->data = a->src[2]->data; }), "ids");
    CHECK(overlapping([](auto * a, auto *, auto * dst) { dst->data = (char *) a->src[0]->data + 100; }), "weights");
    for (int64_t shift : { 0, 4 }) {
        Graph         g(false);
        ggml_tensor * a   = g.product();
        ggml_tensor * sum = g.biased(a);
        g.build({ a, sum });
        sum->data = (char *) sum->src[1]->data + shift;
        CHECK((g.find().following == 1) == (shift == 0), "a sum %ld bytes into its bias", (long) shift);
    }
}

}  // namespace

int main() {
    check_glu();
    check_kinds();
    check_fq4_64();
    check_bias();
    check_refusals();
    check_sum_as_bias();
    check_memory();
    return check_done();
}
