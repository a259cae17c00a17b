// One library of ggml-cpu per kind of processor, as distributions ship llama.cpp: all are opened, the best for this
// processor is used. FQ4 products, with their weights in the buffer that llama.cpp's loader takes, and attention over a
// quantised cache, each against the same in double from the dequantised values. Prints the results' digits, so that
// a run on one processor can be held against a run on another.
//
//     test_variants [FOLDER]    FOLDER of the libraries; default: the program's

#include "check.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml.h"

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

namespace {

using ggml_backend_dev_get_extra_bufts = ggml_backend_buffer_type_t * (*) (ggml_backend_dev_t);

struct machine {
    ggml_backend_dev_t         device;
    ggml_backend_t             backend;
    ggml_backend_buffer_type_t fq4;
};

std::vector<float> numbers(size_t n, unsigned seed, float scale) {
    std::vector<float> x(n);
    for (float & v : x) {
        seed = seed * 1664525u + 1013904223u;
        v    = scale * ((float) (seed >> 8) / (float) (1 << 23) - 1.0f);
    }
    return x;
}

std::vector<uint8_t> quantized(ggml_type type, const std::vector<float> & x, int64_t k, std::vector<float> & back) {
    const int64_t        rows = (int64_t) x.size() / k;
    std::vector<uint8_t> data(ggml_row_size(type, k) * rows);
    ggml_quantize_chunk(type, x.data(), data.data(), 0, rows, k, nullptr);
    back.resize(x.size());
    ggml_get_type_traits(type)->to_float(data.data(), back.data(), (int64_t) x.size());
    return data;
}

std::vector<float> run(const machine & m, ggml_context * ctx, ggml_tensor * result) {
    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, result);
    CHECK(ggml_backend_supports_op(m.backend, result), "%s", ggml_op_name(result->op));
    CHECK(ggml_backend_graph_compute(m.backend, graph) == GGML_STATUS_SUCCESS, "%s", ggml_op_name(result->op));
    std::vector<float> y(ggml_nelements(result));
    ggml_backend_tensor_get(result, y.data(), 0, ggml_nbytes(result));
    return y;
}

// Relative to the result's own size: both sides round their inputs to 8 bits.
void compare(const char * name, const std::vector<float> & got, const std::vector<double> & want, double limit) {
    double error = 0, size = 0, sum = 0;
    for (size_t i = 0; i < got.size(); i++) {
        error += (got[i] - want[i]) * (got[i] - want[i]);
        size += want[i] * want[i];
        sum += (double) got[i] * (double) (1 + i % 7);
    }
    const double relative = std::sqrt(error / size);
    std::printf("%s %.4g, error %.2g\n", name, sum, relative);
    CHECK(relative < limit, "%s: error %g", name, relative);
}

void test_fq4(const machine & m, int64_t n_cols) {
    const int64_t              k = 1024, n_rows = 96;
    ggml_context *             ctx = ggml_init({ 1 << 20, nullptr, true });
    ggml_tensor *              w   = ggml_new_tensor_2d(ctx, GGML_TYPE_FQ4, k, n_rows);
    std::vector<float>         back;
    const std::vector<float>   x       = numbers(k * n_cols, 2, 1.0f);
    const std::vector<uint8_t> data    = quantized(GGML_TYPE_FQ4, numbers(k * n_rows, 1, 0.5f), k, back);
    ggml_backend_buffer_t      weights = ggml_backend_alloc_ctx_tensors_from_buft(ctx, m.fq4);
    ggml_context *             rest    = ggml_init({ 1 << 20, nullptr, true });
    ggml_tensor *              columns = ggml_new_tensor_2d(rest, GGML_TYPE_F32, k, n_cols);
    ggml_tensor *              y       = ggml_mul_mat(rest, w, columns);
    ggml_backend_buffer_t      buffer  = ggml_backend_alloc_ctx_tensors(rest, m.backend);
    ggml_backend_tensor_set(w, data.data(), 0, data.size());
    ggml_backend_tensor_set(columns, x.data(), 0, sizeof(float) * x.size());

    std::vector<double> want(n_rows * n_cols);
    for (int64_t c = 0; c < n_cols; c++) {
        for (int64_t r = 0; r < n_rows; r++) {
            for (int64_t i = 0; i < k; i++) {
                want[c * n_rows + r] += (double) back[r * k + i] * x[c * k + i];
            }
        }
    }
    compare(n_cols == 1 ? "fq4, 1 column:" : "fq4, columns:", run(m, rest, y), want, 0.01);
    ggml_backend_buffer_free(buffer);
    ggml_backend_buffer_free(weights);
    ggml_free(rest);
    ggml_free(ctx);
}

void test_attention(const machine & m) {
    const int64_t              d = 64, n_queries = 5, n_kv = 192;
    const float                scale  = 1.0f / std::sqrt((float) d);
    ggml_context *             ctx    = ggml_init({ 1 << 20, nullptr, true });
    ggml_tensor *              q      = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, d, n_queries, 1);
    ggml_tensor *              k      = ggml_new_tensor_3d(ctx, GGML_TYPE_Q8_0, d, n_kv, 1);
    ggml_tensor *              v      = ggml_new_tensor_3d(ctx, GGML_TYPE_Q8_0, d, n_kv, 1);
    ggml_tensor *              y      = ggml_flash_attn_ext(ctx, q, k, v, nullptr, scale, 0.0f, 0.0f);
    ggml_backend_buffer_t      buffer = ggml_backend_alloc_ctx_tensors(ctx, m.backend);
    std::vector<float>         k_back, v_back;
    const std::vector<float>   queries = numbers(d * n_queries, 3, 2.0f);
    const std::vector<uint8_t> k_data  = quantized(GGML_TYPE_Q8_0, numbers(d * n_kv, 4, 2.0f), d, k_back);
    const std::vector<uint8_t> v_data  = quantized(GGML_TYPE_Q8_0, numbers(d * n_kv, 5, 1.0f), d, v_back);
    ggml_backend_tensor_set(q, queries.data(), 0, sizeof(float) * queries.size());
    ggml_backend_tensor_set(k, k_data.data(), 0, k_data.size());
    ggml_backend_tensor_set(v, v_data.data(), 0, v_data.size());

    std::vector<double> want(d * n_queries);
    for (int64_t i = 0; i < n_queries; i++) {
        std::vector<double> weight(n_kv);
        double              sum = 0;
        for (int64_t j = 0; j < n_kv; j++) {
            double score = 0;
            for (int64_t e = 0; e < d; e++) {
                score += (double) queries[i * d + e] * k_back[j * d + e];
            }
            sum += weight[j] = std::exp(score * scale);
        }
        for (int64_t j = 0; j < n_kv; j++) {
            for (int64_t e = 0; e < d; e++) {
                want[i * d + e] += weight[j] / sum * v_back[j * d + e];
            }
        }
    }
    compare("attention:", run(m, ctx, y), want, 0.03);
    ggml_backend_buffer_free(buffer);
    ggml_free(ctx);
}

}  // namespace

int main(int argc, char ** argv) {
    ggml_backend_load_all_from_path(argc > 1 ? argv[1] : nullptr);
    machine m = {};
    m.device  = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    if (!m.device) {
        std::printf("no library for this processor\n");
        return 1;
    }
    m.backend              = ggml_backend_dev_init(m.device, nullptr);
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(m.device);
    const auto         extra =
        (ggml_backend_dev_get_extra_bufts) ggml_backend_reg_get_proc_address(reg, "ggml_backend_dev_get_extra_bufts");
    for (auto * type = extra(m.device); *type; type++) {
        m.fq4 = std::strcmp(ggml_backend_buft_name(*type), "CPU_FQ4") == 0 ? *type : m.fq4;
    }
    std::string features;
    const auto list = (ggml_backend_get_features_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_get_features");
    for (auto * feature = list(reg); feature->name; feature++) {
        features += std::string(" ") + feature->name;
    }
    std::printf("library with%s\n", features.c_str());
    CHECK(m.fq4 != nullptr, "no CPU_FQ4");
    if (m.fq4) {
        test_fq4(m, 1);
        test_fq4(m, 40);
    }
    test_attention(m);
    ggml_backend_free(m.backend);
    return check_done();
}
