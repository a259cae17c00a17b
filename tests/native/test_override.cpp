// The take-over of upstream's ops: it is there in every kind of build, static archives too, and FQ4's memory is the
// host's. A library without it would run FQ4 and attention through upstream's slow ways, and say nothing.

#include "check.h"
#include "core/cpu/override.h"
#include "ggml-backend-impl.h"
#include "ggml-cpu.h"

#include <cstring>

namespace {

ggml_backend_buffer_type_t find(const char * name, int * place, int * count) {
    ggml_backend_reg_t reg = ggml_backend_cpu_reg();
    const auto         bufts =
        (ggml_backend_dev_get_extra_bufts_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_dev_get_extra_bufts");
    ggml_backend_buffer_type_t found = nullptr;
    *count                           = 0;
    for (auto * type = bufts(ggml_backend_reg_dev_get(reg, 0)); *type; type++, (*count)++) {
        if (std::strcmp(ggml_backend_buft_name(*type), name) == 0) {
            found  = *type;
            *place = *count;
        }
    }
    return found;
}

// Whether a plan for the product asks for the scratch of our code, which upstream's would not.
bool taken_over() {
    ggml_context * ctx     = ggml_init({ 1 << 20, nullptr, true });
    ggml_tensor *  weights = ggml_new_tensor_2d(ctx, GGML_TYPE_FQ4, 256, 64);
    ggml_tensor *  product = ggml_mul_mat(ctx, weights, ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 256, 64));
    ggml_cgraph *  graph   = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, product);
    const size_t planned = ggml_graph_plan(graph, 1, nullptr).work_size;
    const size_t ours    = ggml_ext_cpu_fq4_mul_mat.work_size(product, 1);
    ggml_free(ctx);
    const size_t upstream = ggml_row_size(GGML_TYPE_Q8_K, 256) * 64;
    return planned >= ours && planned < ours + 1024 && ours > upstream + 1024;
}

}  // namespace

int main() {
    int                        place = 0, count = 0;
    ggml_backend_buffer_type_t type = find("CPU_FQ4", &place, &count);
    CHECK(type != nullptr, "no CPU_FQ4 among %d", count);
    if (type == nullptr) {
        return check_done();
    }
    CHECK(place == count - 1, "upstream's buffer types come first: %d of %d", place, count);
    CHECK(ggml_backend_buft_is_host(type), "what is locked, counted and copied as host memory");
    CHECK(taken_over(), "FQ4 products");

    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(type, 1000);
    CHECK(buffer && ggml_backend_buffer_is_host(buffer), "its buffers too");
    CHECK((uintptr_t) ggml_backend_buffer_get_base(buffer) % ggml_backend_buft_get_alignment(type) == 0, "alignment");
    ggml_backend_buffer_free(buffer);
    return check_done();
}
