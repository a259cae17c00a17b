// Cases for upstream's test-backend-ops, included by the patched tests/test-backend-ops.cpp after its
// own test structures. Its tolerances apply; the CPU backend with use_ref is the reference.

#pragma once

#include "backend-ops-attention.h"
#include "backend-ops-attention_decode.h"
#include "backend-ops-fq4-tiles.h"
#include "backend-ops-fq4.h"
#include "backend-ops-kron.h"
#include "backend-ops-sample.h"
#include "hooks/ggml-ext-hooks.h"

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
    ggml_ext_backend_ops_kron_cases(cases);
    ggml_ext_backend_ops_fq4_cases(cases);
    ggml_ext_backend_ops_fq4_tiles_cases(cases);
    ggml_ext_backend_ops_attention_decode_cases(cases);
    ggml_ext_backend_ops_attention_cases(cases);
    ggml_ext_backend_ops_sample_cases(cases);
}

static void ggml_ext_backend_ops_perf_cases(std::vector<std::unique_ptr<test_case>> & cases) {
    ggml_ext_backend_ops_kron_perf_cases(cases);
    ggml_ext_backend_ops_fq4_perf_cases(cases);
    ggml_ext_backend_ops_fq4_tiles_perf_cases(cases);
    ggml_ext_backend_ops_attention_decode_perf_cases(cases);
    ggml_ext_backend_ops_attention_perf_cases(cases);
    ggml_ext_backend_ops_sample_perf_cases(cases);
}
