// GGML_OP_EXT: names, and the CPU dispatch with every thread count, against plain loops.

#include "check.h"
#include "core/ext_op.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <cstring>
#include <vector>

namespace {

void test_names() {
    CHECK(std::strcmp(ggml_op_name(GGML_OP_EXT), "EXT") == 0, "%s", ggml_op_name(GGML_OP_EXT));
    CHECK(std::strcmp(ggml_op_symbol(GGML_OP_EXT), "ext(x)") == 0, "%s", ggml_op_symbol(GGML_OP_EXT));
    CHECK(std::strcmp(ggml_op_name(GGML_OP_GLU), "GLU") == 0, "upstream's names stay in place");
    for (int i = 0; i < GGML_EXT_OP_COUNT; i++) {
        CHECK(ggml_ext_op_name(i) != nullptr && std::strlen(ggml_ext_op_name(i)) > 0, "sub-op %d", i);
    }
    CHECK(std::strcmp(ggml_ext_op_name(-1), "unknown") == 0, "negative id");
    CHECK(std::strcmp(ggml_ext_op_name(GGML_EXT_OP_COUNT), "unknown") == 0, "id past the end");
}

void test_scale_add(int64_t ne0, int64_t ne1, int64_t ne2, int n_threads) {
    const ggml_init_params params = { 16 * 1024 * 1024, nullptr, false };
    ggml_context *         ctx    = ggml_init(params);
    ggml_tensor *          whole  = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, ne0, ne2, ne1);
    ggml_tensor *          a      = ggml_permute(ctx, whole, 0, 2, 1, 3);  // rows not adjacent
    ggml_tensor *          b      = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, ne0, ne1, ne2);
    for (int64_t i = 0; i < ggml_nelements(b); i++) {
        ((float *) whole->data)[i] = (float) (i % 977) * 0.25f;
        ((float *) b->data)[i]     = (float) (i % 311) - 100.0f;
    }
    ggml_tensor * y     = ggml_ext_scale_add(ctx, a, b, -2.0f);
    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, y);
    CHECK(ggml_graph_compute_with_ctx(ctx, graph, n_threads) == GGML_STATUS_SUCCESS, "status");
    for (int64_t i2 = 0; i2 < ne2; i2++) {
        for (int64_t i1 = 0; i1 < ne1; i1++) {
            for (int64_t i0 = 0; i0 < ne0; i0++) {
                const float va = ((const float *) whole->data)[i0 + ne0 * (i2 + ne2 * i1)];
                const float vb = ((const float *) b->data)[i0 + ne0 * (i1 + ne1 * i2)];
                const float vy = ((const float *) y->data)[i0 + ne0 * (i1 + ne1 * i2)];
                CHECK(vy == -2.0f * va + vb, "[%d %d %d]", (int) i0, (int) i1, (int) i2);
            }
        }
    }
    ggml_free(ctx);
}

}  // namespace

int main() {
    test_names();
    for (int n_threads = 1; n_threads <= 4; n_threads++) {
        test_scale_add(1, 1, 1, n_threads);
        test_scale_add(33, 5, 3, n_threads);
        test_scale_add(256, 1, 7, n_threads);
    }
    return check_done();
}
