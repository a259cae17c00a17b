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

// GGML_OP_EXT, kron: n1 x n2 channels; a factor of type GGML_TYPE_COUNT is absent.
struct test_ext_kron : public test_case {
    const int64_t                n1, n2;
    const std::array<int64_t, 3> rows;
    const ggml_type              left, right;
    const bool                   hadamard;  // of order n2
    const float                  clip;
    const bool                   permuted;  // dimensions 1 and 2 of x swapped in memory

    // GGML_TYPE_COUNT stands for no factor and has no name.
    static std::string factor_name(ggml_type type) { return type == GGML_TYPE_COUNT ? "none" : ggml_type_name(type); }

    std::string vars() override {
        return VARS_TO_STR6(n1, n2, rows, hadamard, clip, permuted) + ",left=" + factor_name(left) +
               ",right=" + factor_name(right);
    }

    std::string op_desc(ggml_tensor * t) override {
        GGML_UNUSED(t);
        return "EXT_KRON";
    }

    uint64_t op_flops(ggml_tensor * t) override {
        const int64_t depth = (left != GGML_TYPE_COUNT ? n1 : 0) + (right != GGML_TYPE_COUNT ? n2 : 0);
        return 2 * ggml_nelements(t) * depth;
    }

    test_ext_kron(int64_t n1, int64_t n2, std::array<int64_t, 3> rows, ggml_type left, ggml_type right,
                  bool hadamard = false, float clip = 1.0f, bool permuted = false) :
        n1(n1), n2(n2), rows(rows), left(left), right(right), hadamard(hadamard), clip(clip), permuted(permuted) {}

    ggml_tensor * build_graph(ggml_context * ctx) override {
        ggml_tensor * x = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, n1 * n2, rows[permuted], rows[!permuted], rows[2]);
        if (permuted) {
            x = ggml_permute(ctx, x, 0, 2, 1, 3);
        }
        ggml_tensor * l = left == GGML_TYPE_COUNT ? nullptr : ggml_new_tensor_2d(ctx, left, n1, n1);
        ggml_tensor * r = right == GGML_TYPE_COUNT ? nullptr : ggml_new_tensor_2d(ctx, right, n2, n2);
        return ggml_ext_kron(ctx, x, l, r, hadamard ? (int) n2 : 0, clip);
    }
};

// GGML_OP_EXT, act_round. Backends may differ in the last bit of x / scale and so, at a tie, by one
// step of the grid: few values, within upstream's tolerance on the squared error.
struct test_ext_act_round : public test_case {
    const std::array<int64_t, 4> ne;
    const int                    bits, group;
    const bool                   permuted;

    std::string vars() override { return VARS_TO_STR4(ne, bits, group, permuted); }

    std::string op_desc(ggml_tensor * t) override {
        GGML_UNUSED(t);
        return "EXT_ACT_ROUND";
    }

    test_ext_act_round(std::array<int64_t, 4> ne, int bits, int group, bool permuted) :
        ne(ne), bits(bits), group(group), permuted(permuted) {}

    ggml_tensor * build_graph(ggml_context * ctx) override {
        ggml_tensor * x = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, ne[0], ne[1 + permuted], ne[2 - permuted], ne[3]);
        if (permuted) {
            x = ggml_permute(ctx, x, 0, 2, 1, 3);
        }
        return ggml_ext_act_round(ctx, x, bits, group);
    }
};

static void ggml_ext_backend_ops_kron_cases(std::vector<std::unique_ptr<test_case>> & cases) {
    const ggml_type none = GGML_TYPE_COUNT;
    for (ggml_type left : { none, GGML_TYPE_F32, GGML_TYPE_F16 }) {
        for (ggml_type right : { none, GGML_TYPE_F32, GGML_TYPE_F16 }) {
            for (float clip : { 1.0f, 0.6f }) {
                for (bool permuted : { false, true }) {
                    if (left != none || right != none || clip < 1.0f) {
                        cases.emplace_back(new test_ext_kron(32, 64, { 1, 1, 1 }, left, right, false, clip, permuted));
                        cases.emplace_back(new test_ext_kron(7, 33, { 3, 5, 2 }, left, right, false, clip, permuted));
                    }
                    if (right == none) {
                        cases.emplace_back(new test_ext_kron(5, 64, { 9, 2, 1 }, left, none, true, clip, permuted));
                        cases.emplace_back(new test_ext_kron(3, 4, { 2, 2, 1 }, left, none, true, clip, permuted));
                    }
                }
            }
            if (left != none || right != none) {
                cases.emplace_back(new test_ext_kron(64, 128, { 33, 1, 1 }, left, right));
            }
        }
    }
    for (int bits : { 2, 4, 8 }) {
        for (int group : { 0, 32, 100, 256 }) {
            for (bool permuted : { false, true }) {
                cases.emplace_back(new test_ext_act_round({ 2048, 1, 1, 1 }, bits, group, permuted));
                cases.emplace_back(new test_ext_act_round({ 333, 5, 3, 2 }, bits, group, permuted));
            }
        }
    }
}

static void ggml_ext_backend_ops_eval_cases(std::vector<std::unique_ptr<test_case>> & cases) {
    for (bool permuted : { false, true }) {
        cases.emplace_back(new test_ext_scale_add({ 1, 1, 1, 1 }, 0.5f, permuted));
        cases.emplace_back(new test_ext_scale_add({ 33, 7, 3, 2 }, -1.5f, permuted));
        cases.emplace_back(new test_ext_scale_add({ 256, 129, 1, 1 }, 0.0f, permuted));
    }
    ggml_ext_backend_ops_kron_cases(cases);
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
    for (ggml_type factors : { GGML_TYPE_F32, GGML_TYPE_F16 }) {
        for (int64_t n : { 1, 512 }) {
            cases.emplace_back(new test_ext_kron(32, 64, { n, 1, 1 }, factors, factors));
            cases.emplace_back(new test_ext_kron(64, 128, { n, 1, 1 }, factors, factors));
            cases.emplace_back(new test_ext_kron(32, 64, { n, 1, 1 }, factors, GGML_TYPE_COUNT));
        }
    }
    for (ggml_type type : { GGML_TYPE_FQ4, GGML_TYPE_Q4_0, GGML_TYPE_Q4_K, GGML_TYPE_IQ4_XS }) {
        for (int n : { 1, 512 }) {
            cases.emplace_back(new test_mul_mat(type, GGML_TYPE_F32, 4096, n, 14336, { 1, 1 }, { 1, 1 }));
        }
    }
}
