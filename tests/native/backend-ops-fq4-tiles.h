// FQ4 and FQ4_64 products with many columns, for upstream's test-backend-ops: tiles of every width, ragged edges, parts of tiles
// that several thread blocks compute, batches, experts. Upstream's tolerance.

#pragma once

static void ggml_ext_backend_ops_fq4_64_tiles_cases(std::vector<std::unique_ptr<test_case>> & cases) {
    for (int64_t n : { 9, 16, 17, 33, 65, 129, 300 }) {
        cases.emplace_back(new test_mul_mat(GGML_TYPE_FQ4_64, GGML_TYPE_F32, 200, n, 576, { 1, 1 }, { 1, 1 }));
    }
    cases.emplace_back(new test_mul_mat(GGML_TYPE_FQ4_64, GGML_TYPE_F32, 129, 65, 192, { 2, 3 }, { 2, 1 }));
    cases.emplace_back(new test_mul_mat(GGML_TYPE_FQ4_64, GGML_TYPE_F32, 1024, 16, 14400, { 1, 1 }, { 1, 1 }));
    for (int n : { 9, 40, 200 }) {
        cases.emplace_back(new test_mul_mat_id(GGML_TYPE_FQ4_64, GGML_TYPE_F32, 8, 2, false, 130, n, 320));
    }
}

static void ggml_ext_backend_ops_fq4_tiles_cases(std::vector<std::unique_ptr<test_case>> & cases) {
    ggml_ext_backend_ops_fq4_64_tiles_cases(cases);
    const auto product = [&](int64_t m, int64_t n, int64_t k, std::array<int64_t, 2> batch = { 1, 1 },
                             std::array<int64_t, 2> repeat = { 1, 1 }) {
        cases.emplace_back(new test_mul_mat(GGML_TYPE_FQ4, GGML_TYPE_F32, m, n, k, batch, repeat));
    };
    for (int64_t n : { 9, 16, 17, 32, 33, 64, 65, 128, 129, 300 }) {
        product(200, n, 768);
    }
    for (int64_t m : { 1, 31, 127, 128, 129 }) {
        product(m, 40, 256);
    }
    product(1024, 16, 14336);
    product(4096, 24, 4096);
    product(1024, 512, 4096);
    product(129, 65, 512, { 2, 3 }, { 2, 1 });
    product(48, 150, 256, { 1, 2 }, { 3, 2 });
    for (bool shared : { false, true }) {
        for (int n : { 9, 40, 200 }) {
            cases.emplace_back(new test_mul_mat_id(GGML_TYPE_FQ4, GGML_TYPE_F32, 8, 2, shared, 130, n, 512));
        }
        cases.emplace_back(new test_mul_mat_id(GGML_TYPE_FQ4, GGML_TYPE_F32, 32, 4, shared, 65, 33, 256, 1.0f, 70));
    }
}

// Prefill at the shapes of an 8B model, besides small batches, and of a model with 128 experts.
static void ggml_ext_backend_ops_fq4_tiles_perf_cases(std::vector<std::unique_ptr<test_case>> & cases) {
    for (ggml_type type : { GGML_TYPE_FQ4, GGML_TYPE_Q4_0, GGML_TYPE_Q4_K }) {
        for (int64_t n : { 16, 32, 64, 512, 4096 }) {
            for (auto [m, k] : std::initializer_list<std::pair<int64_t, int64_t>>{
                     { 4096,  4096  },
                     { 1024,  4096  },
                     { 14336, 4096  },
                     { 4096,  14336 }
            }) {
                cases.emplace_back(new test_mul_mat(type, GGML_TYPE_F32, m, n, k, { 1, 1 }, { 1, 1 }));
            }
        }
        cases.emplace_back(new test_mul_mat_id(type, GGML_TYPE_F32, 128, 8, false, 768, 512, 2048));
    }
}
