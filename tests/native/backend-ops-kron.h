// GGML_OP_EXT, kron and act_round, for upstream's test-backend-ops; included by backend-ops-cases.h.

#pragma once

#include "core/ext_op.h"
#include "kron/kron.h"

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

// A transform whose result FQ4 products read, one of them perhaps with another reader beside it: what backends fuse.
// Products round it to int8 with scales of their own, hence the tolerance of upstream's MUL_MAT.
struct test_ext_kron_mul_mat : public test_case {
    const int64_t n1, n2, tokens;
    const bool    observed;  // an op reads the F32 result too

    std::string vars() override { return VARS_TO_STR4(n1, n2, tokens, observed); }

    std::string op_desc(ggml_tensor * t) override {
        GGML_UNUSED(t);
        return "EXT_KRON_MUL_MAT";
    }

    bool run_whole_graph() override { return true; }

    double max_nmse_err() override { return 5e-4; }

    test_ext_kron_mul_mat(int64_t n1, int64_t n2, int64_t tokens, bool observed) :
        n1(n1), n2(n2), tokens(tokens), observed(observed) {}

    ggml_tensor * build_graph(ggml_context * ctx) override {
        ggml_tensor * x     = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n1 * n2, tokens);
        ggml_tensor * left  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n1, n1);
        ggml_tensor * right = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n2, n2);
        ggml_tensor * kron  = ggml_ext_kron(ctx, x, left, right, 0, 0.9f);
        ggml_ext_kron_set_unobserved(kron);
        ggml_tensor * y[2];
        for (ggml_tensor *& product : y) {
            product = ggml_mul_mat(ctx, ggml_new_tensor_2d(ctx, GGML_TYPE_FQ4, n1 * n2, 64), kron);
        }
        ggml_tensor * sum = ggml_add(ctx, y[0], y[1]);
        return observed ? ggml_add(ctx, sum, ggml_sum_rows(ctx, kron)) : sum;
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

// n1, n2 as FlatQuant splits hidden and feed-forward sizes.
static const std::pair<int64_t, int64_t> ggml_ext_kron_model_shapes[] = {
    { 32,  64  }, // Llama 3 1B: 2048
    { 64,  128 }, // 8192
    { 64,  64  }, // Llama 3 8B: 4096
    { 112, 128 }, // 14336
    { 56,  64  }, // Qwen 2.5 7B: 3584
    { 148, 128 }, // 18944
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
    for (bool observed : { false, true }) {
        for (int64_t tokens : { 1, 33 }) {
            cases.emplace_back(new test_ext_kron_mul_mat(32, 64, tokens, observed));
            cases.emplace_back(new test_ext_kron_mul_mat(112, 128, tokens, observed));
        }
    }
    // FlatQuant's shapes: Llama 3 1B and 8B, Qwen 2.5 7B, heads; one token and a few.
    for (int64_t n : { 1, 5 }) {
        for (const auto & [n1, n2] : ggml_ext_kron_model_shapes) {
            cases.emplace_back(new test_ext_kron(n1, n2, { n, 1, 1 }, GGML_TYPE_F32, GGML_TYPE_F32, false, 0.8f));
        }
        cases.emplace_back(new test_ext_kron(32, 128, { n, 1, 1 }, GGML_TYPE_F32, none));
        cases.emplace_back(new test_ext_kron(112, 128, { n, 1, 1 }, GGML_TYPE_F16, none, true));
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

static void ggml_ext_backend_ops_kron_perf_cases(std::vector<std::unique_ptr<test_case>> & cases) {
    for (int64_t n : { 1, 8, 512, 4096 }) {
        for (const auto & [n1, n2] : ggml_ext_kron_model_shapes) {
            cases.emplace_back(new test_ext_kron(n1, n2, { n, 1, 1 }, GGML_TYPE_F32, GGML_TYPE_F32));
        }
        cases.emplace_back(new test_ext_kron(64, 64, { n, 1, 1 }, GGML_TYPE_F16, GGML_TYPE_F16));
        cases.emplace_back(new test_ext_kron(32, 128, { n, 1, 1 }, GGML_TYPE_F32, GGML_TYPE_COUNT));
        cases.emplace_back(new test_ext_act_round({ 4096, n, 1, 1 }, 4, 0, false));
    }
}
