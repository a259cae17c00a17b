// Who reads the result of a Kronecker transform, as cuda/kron/kron.cu asks before it leaves the F32 values unwritten. Each case
// is a graph in which one more thing reads it: a mistake here would give a product memory that nobody has written.

#pragma GCC diagnostic ignored "-Wunused-function"  // in upstream's ggml-impl.h

#include "check.h"
#include "ggml-cpp.h"
#include "kron/kron.h"
#include "kron/uses.h"

#include <functional>

namespace {

struct builder {
    ggml_context * ctx;
    ggml_cgraph *  graph;
    ggml_tensor *  kron;

    ggml_tensor * weight(ggml_type type = GGML_TYPE_FQ4) { return ggml_new_tensor_2d(ctx, type, 256, 8); }

    void add(ggml_tensor * t) { ggml_build_forward_expand(graph, t); }
};

void check(const char * name, int n_products, bool no_others, const std::function<void(builder &)> & build) {
    ggml_context_ptr ctx(ggml_init({ 1 << 20, nullptr, true }));
    builder          b = { ctx.get(), ggml_new_graph(ctx.get()), nullptr };
    ggml_tensor *    x = ggml_new_tensor_2d(b.ctx, GGML_TYPE_F32, 256, 3);
    b.kron             = ggml_ext_kron(b.ctx, x, ggml_new_tensor_2d(b.ctx, GGML_TYPE_F32, 16, 16), nullptr, 0, 1.0f);
    b.add(b.kron);
    build(b);
    int i = 0;
    while (ggml_graph_node(b.graph, i) != b.kron) {
        i++;
    }
    const ggml_ext_kron_uses uses = ggml_ext_kron_uses_of(b.graph, i);
    CHECK(uses.n_products == n_products && uses.no_others == no_others, "%s: %d products, no others: %d", name,
          uses.n_products, uses.no_others);
}

}  // namespace

int main() {
    const auto product = [](builder & b) { b.add(ggml_mul_mat(b.ctx, b.weight(), b.kron)); };
    check("nobody", 0, false, [](builder &) {});
    check("one product", 1, true, product);
    check("two products", 2, true, [&](builder & b) {
        product(b);
        product(b);
    });
    check("experts", 1, true, [](builder & b) {
        ggml_tensor * weights = ggml_new_tensor_3d(b.ctx, GGML_TYPE_FQ4, 256, 8, 4);
        ggml_tensor * x       = ggml_reshape_3d(b.ctx, ggml_dup(b.ctx, b.kron), 256, 1, 3);
        b.kron = ggml_ext_kron(b.ctx, x, ggml_new_tensor_2d(b.ctx, GGML_TYPE_F32, 16, 16), nullptr, 0, 1.0f);
        b.add(ggml_mul_mat_id(b.ctx, weights, b.kron, ggml_new_tensor_2d(b.ctx, GGML_TYPE_I32, 2, 3)));
    });
    check("other weights too", 1, false, [&](builder & b) {
        product(b);
        b.add(ggml_mul_mat(b.ctx, b.weight(GGML_TYPE_Q8_0), b.kron));
    });
    check("an op too", 1, false, [&](builder & b) {
        product(b);
        b.add(ggml_scale(b.ctx, b.kron, 2.0f));
    });
    check("through a view", 1, false, [&](builder & b) {
        product(b);
        b.add(ggml_mul_mat(b.ctx, b.weight(), ggml_reshape_2d(b.ctx, b.kron, 256, 3)));
    });
    check("an output of the graph", 1, false, [&](builder & b) {
        ggml_set_output(b.kron);
        product(b);
    });
    check("another product between", 1, false, [&](builder & b) {
        product(b);
        b.add(ggml_mul_mat(b.ctx, b.weight(), ggml_new_tensor_2d(b.ctx, GGML_TYPE_F32, 256, 3)));
        product(b);
    });
    check("a product of other groups too", 1, false, [&](builder & b) {
        product(b);
        b.add(ggml_mul_mat(b.ctx, b.weight(GGML_TYPE_FQ4_64), b.kron));
    });
    check("a product of other groups between", 1, false, [&](builder & b) {
        product(b);
        b.add(ggml_mul_mat(b.ctx, b.weight(GGML_TYPE_FQ4_64), ggml_new_tensor_2d(b.ctx, GGML_TYPE_F32, 256, 3)));
        product(b);
    });
    check("another transform between", 1, false, [&](builder & b) {
        product(b);
        b.add(ggml_ext_kron(b.ctx, ggml_new_tensor_2d(b.ctx, GGML_TYPE_F32, 256, 3), nullptr, nullptr, 16, 1.0f));
        product(b);
    });
    check("readers in another split", 1, false, [&](builder & b) {
        product(b);
        product(b);
        b.graph->n_nodes--;  // what a split of the scheduler sees: fewer nodes, the whole graph's use counts
    });

    ggml_context_ptr ctx(ggml_init({ 1 << 20, nullptr, true }));
    ggml_tensor *    kron =
        ggml_ext_kron(ctx.get(), ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, 256, 3), nullptr, nullptr, 16, 0.5f);
    ggml_ext_kron_params params;
    memcpy(&params, kron->op_params + 1, sizeof(params));
    CHECK(params.unobserved == 0, "observed unless said otherwise");
    ggml_ext_kron_set_unobserved(kron);
    memcpy(&params, kron->op_params + 1, sizeof(params));
    CHECK(params.unobserved == 1 && params.hadamard == 16 && params.clip == 0.5f, "the rest of the parameters stays");
    return check_done();
}
