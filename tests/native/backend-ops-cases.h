// Cases for upstream's test-backend-ops, included by the patched tests/test-backend-ops.cpp after its
// own test structures. Its tolerances apply; the CPU backend with use_ref is the reference.

#pragma once

#include "ggml-ext-hooks.h"

// GGML_OP_EXT, scale_add: rows that need not be adjacent.
struct test_ext_scale_add : public test_case {
    const std::array<int64_t, 4> ne;
    const float                  scale;
    const bool                   permuted;  // dimensions 1 and 2 of a swapped in memory

    std::string vars() override { return VARS_TO_STR3(ne, scale, permuted); }

    std::string op_desc(ggml_tensor * t) override {
        GGML_UNUSED(t);
        return "EXT_SCALE_ADD";
    }

    test_ext_scale_add(std::array<int64_t, 4> ne, float scale, bool permuted) :
        ne(ne), scale(scale), permuted(permuted) {}

    ggml_tensor * build_graph(ggml_context * ctx) override {
        ggml_tensor * a = permuted ? ggml_new_tensor_4d(ctx, GGML_TYPE_F32, ne[0], ne[2], ne[1], ne[3]) :
                                     ggml_new_tensor_4d(ctx, GGML_TYPE_F32, ne[0], ne[1], ne[2], ne[3]);
        ggml_tensor * b = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, ne[0], ne[1], ne[2], ne[3]);
        if (permuted) {
            a = ggml_permute(ctx, a, 0, 2, 1, 3);
        }
        return ggml_ext_scale_add(ctx, a, b, scale);
    }
};

static void ggml_ext_backend_ops_eval_cases(std::vector<std::unique_ptr<test_case>> & cases) {
    for (bool permuted : { false, true }) {
        cases.emplace_back(new test_ext_scale_add({ 1, 1, 1, 1 }, 0.5f, permuted));
        cases.emplace_back(new test_ext_scale_add({ 33, 7, 3, 2 }, -1.5f, permuted));
        cases.emplace_back(new test_ext_scale_add({ 256, 129, 1, 1 }, 0.0f, permuted));
    }
    const ggml_type type = GGML_TYPE_FQ4;
    for (int n : { 1, 2, 7, 33 }) {
        for (int k : { 256, 512, 1024 }) {
            cases.emplace_back(new test_mul_mat(type, GGML_TYPE_F32, 33, n, k, { 1, 1 }, { 1, 1 }));
        }
        cases.emplace_back(new test_mul_mat(type, GGML_TYPE_F32, 16, n, 256, { 2, 3 }, { 2, 2 }));
        cases.emplace_back(new test_mul_mat_id(type, GGML_TYPE_F32, 4, 2, false, 65, n, 512));
        cases.emplace_back(new test_mul_mat_id(type, GGML_TYPE_F32, 8, 8, true, 32, n, 256));
    }
    cases.emplace_back(new test_get_rows(type, 256, 5, 4, 1, 1, false));
    cases.emplace_back(new test_get_rows(type, 768, 80, 7, 2, 3, true));
}

static void ggml_ext_backend_ops_perf_cases(std::vector<std::unique_ptr<test_case>> & cases) {
    for (ggml_type type : { GGML_TYPE_FQ4, GGML_TYPE_Q4_0, GGML_TYPE_Q4_K, GGML_TYPE_IQ4_XS }) {
        for (int n : { 1, 512 }) {
            cases.emplace_back(new test_mul_mat(type, GGML_TYPE_F32, 4096, n, 14336, { 1, 1 }, { 1, 1 }));
        }
    }
}
