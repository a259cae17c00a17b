// GGML_EXT_OP_SAMPLE in upstream's test-backend-ops: backends must agree on every token.

#pragma once

#include "hooks/ggml-ext-hooks.h"

#include <cmath>
#include <random>

// Logits are normal with standard deviation `spread`. Each row has a uniform number of its own.
struct test_ext_sample : public test_case {
    const int64_t n_vocab, n_rows;
    const int     top_k;
    const float   top_p, min_p, temperature, spread;
    const bool    padded;  // rows are not adjacent

    std::string vars() override {
        return VARS_TO_STR8(n_vocab, n_rows, top_k, top_p, min_p, temperature, spread, padded);
    }

    std::string op_desc(ggml_tensor * t) override {
        GGML_UNUSED(t);
        return "EXT_SAMPLE";
    }

    double max_nmse_err() override { return 0.0; }

    uint64_t op_size(ggml_tensor * t) override {
        GGML_UNUSED(t);
        return uint64_t(n_vocab * n_rows) * 4;
    }

    test_ext_sample(int64_t n_vocab, int64_t n_rows, int top_k, float top_p, float min_p, float temperature,
                    float spread, bool padded = false) :
        n_vocab(n_vocab), n_rows(n_rows), top_k(top_k), top_p(top_p), min_p(min_p), temperature(temperature),
        spread(spread), padded(padded) {}

    ggml_tensor * build_graph(ggml_context * ctx) override {
        ggml_tensor * logits = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_vocab + padded, n_rows);
        ggml_tensor * params = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, GGML_EXT_SAMPLE_WORDS, n_rows);
        ggml_set_name(logits, "logits");
        ggml_set_name(params, "params");
        if (padded) {
            logits = ggml_view_2d(ctx, logits, n_vocab, n_rows, logits->nb[1], 0);
        }
        return ggml_ext_sample(ctx, logits, params, nullptr);
    }

    void initialize_tensors(ggml_context * ctx) override {
        std::mt19937_64 random(uint64_t(n_vocab * 131 + n_rows));
        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
            if (t->view_src) {
                continue;
            }
            if (strcmp(t->name, "logits") == 0) {
                std::normal_distribution<float> normal(0.0f, spread);
                std::vector<float>              values(ggml_nelements(t));
                std::generate(values.begin(), values.end(), [&] { return normal(random); });
                ggml_backend_tensor_set(t, values.data(), 0, values.size() * sizeof(values[0]));
            } else if (strcmp(t->name, "params") == 0) {
                std::vector<ggml_ext_sample_params> rows;
                for (int64_t i = 0; i < n_rows; i++) {
                    const double log_min_p = min_p > 0 ? std::log(double(min_p)) : -INFINITY;
                    rows.push_back({ top_k, top_p, log_min_p, 1, temperature, random() });
                }
                ggml_backend_tensor_set(t, rows.data(), 0, rows.size() * sizeof(rows[0]));
            } else {
                init_tensor_uniform(t);  // upstream's guards around the others
            }
        }
    }
};

static void ggml_ext_backend_ops_sample_cases(std::vector<std::unique_ptr<test_case>> & cases) {
    for (int64_t n_vocab : { 1, 333, 32000, 151936 }) {
        for (float spread : { 0.2f, 3.0f, 40.0f }) {
            const int64_t n_rows = n_vocab > 100000 ? 3 : 70;
            const bool    padded = spread == 3.0f;
            cases.emplace_back(new test_ext_sample(n_vocab, n_rows, 40, 0.95f, 0.05f, 0.8f, spread, padded));
            cases.emplace_back(new test_ext_sample(n_vocab, n_rows, 3000, 0.9f, 0.0f, 1.0f, spread, padded));
            cases.emplace_back(new test_ext_sample(n_vocab, n_rows, 0, 0.95f, 0.0f, 1.0f, spread, padded));
            cases.emplace_back(new test_ext_sample(n_vocab, n_rows, 0, 1.0f, 0.02f, 1.5f, spread, padded));
            cases.emplace_back(new test_ext_sample(n_vocab, n_rows, 0, 1.0f, 0.0f, 0.0f, spread, padded));
        }
    }
}

static void ggml_ext_backend_ops_sample_perf_cases(std::vector<std::unique_ptr<test_case>> & cases) {
    for (int64_t n_rows : { 1, 32 }) {
        for (float spread : { 1.0f, 3.0f }) {
            cases.emplace_back(new test_ext_sample(151936, n_rows, 0, 0.95f, 0.0f, 1.0f, spread));
            cases.emplace_back(new test_ext_sample(151936, n_rows, 40, 0.95f, 0.05f, 0.8f, spread));
        }
    }
}
