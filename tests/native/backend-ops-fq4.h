// Cases of FQ4 and its relatives for upstream's test-backend-ops: see backend-ops-cases.h.

#pragma once

static void ggml_ext_backend_ops_fq4_mul_mat_cases(std::vector<std::unique_ptr<test_case>> & cases) {
    const ggml_type type = GGML_TYPE_FQ4;
    for (int n : { 1, 2, 3, 4, 5, 6, 7, 8, 9, 33 }) {
        for (int k : { 256, 512, 768, 1024, 3584 }) {
            cases.emplace_back(new test_mul_mat(type, GGML_TYPE_F32, 33, n, k, { 1, 1 }, { 1, 1 }));
        }
        cases.emplace_back(new test_mul_mat(type, GGML_TYPE_F32, 16, n, 256, { 2, 3 }, { 2, 2 }));
        cases.emplace_back(new test_mul_mat(type, GGML_TYPE_F32, 16, n, 512, { 2, 3 }, { 1, 1 }, { 0, 2, 1, 3 }));
    }
    for (int n : { 1, 2, 7, 9, 33 }) {
        cases.emplace_back(new test_mul_mat_id(type, GGML_TYPE_F32, 4, 2, false, 65, n, 512));
        cases.emplace_back(new test_mul_mat_id(type, GGML_TYPE_F32, 8, 8, true, 32, n, 256));
        cases.emplace_back(new test_mul_mat_id(type, GGML_TYPE_F32, 8, 3, false, 33, n, 1280));
    }
}

static void ggml_ext_backend_ops_fq4_fusion_cases(std::vector<std::unique_ptr<test_case>> & cases, ggml_type type,
                                                  int64_t k) {
    for (ggml_glu_op op : { GGML_GLU_OP_SWIGLU, GGML_GLU_OP_GEGLU, GGML_GLU_OP_SWIGLU_OAI, GGML_GLU_OP_SWIGLU_CLAMP }) {
        for (bool bias : { false, true }) {
            for (int m : { 1, 2 }) {
                cases.emplace_back(new test_mul_mat_vec_fusion(type, op, m, 33, k, false, 1, 1, false, bias));
                for (bool broadcast : { false, true }) {
                    cases.emplace_back(new test_mul_mat_vec_fusion(type, op, m, 33, k, true, 8, 3, broadcast, bias));
                }
            }
        }
    }
    for (bool id : { false, true }) {
        cases.emplace_back(
            new test_mul_mat_vec_fusion(type, GGML_GLU_OP_SWIGLU, 1, 33, k, id, 8, 3, false, true, false));
    }
}

// Rows that FQ4 does not take.
static void ggml_ext_backend_ops_fq4_64_cases(ggml_type type, std::vector<std::unique_ptr<test_case>> & cases) {
    for (int n : { 1, 2, 7, 8, 9, 33 }) {
        for (int k : { 64, 192, 576, 1152 }) {
            cases.emplace_back(new test_mul_mat(type, GGML_TYPE_F32, 33, n, k, { 1, 1 }, { 1, 1 }));
        }
        cases.emplace_back(new test_mul_mat(type, GGML_TYPE_F32, 16, n, 576, { 2, 3 }, { 2, 2 }));
        cases.emplace_back(new test_mul_mat_id(type, GGML_TYPE_F32, 8, 3, false, 33, n, 576));
    }
    cases.emplace_back(new test_get_rows(type, 576, 80, 7, 2, 3, true));
    cases.emplace_back(new test_cpy(type, GGML_TYPE_F32, { 576, 5, 3, 2 }));
}

static void ggml_ext_backend_ops_fq3_cases(std::vector<std::unique_ptr<test_case>> & cases) {
    const ggml_type type = GGML_TYPE_FQ3;
    for (int n : { 1, 2, 7, 8, 9, 33 }) {
        for (int k : { 256, 768, 1024 }) {
            cases.emplace_back(new test_mul_mat(type, GGML_TYPE_F32, 33, n, k, { 1, 1 }, { 1, 1 }));
        }
        cases.emplace_back(new test_mul_mat(type, GGML_TYPE_F32, 16, n, 512, { 2, 3 }, { 2, 2 }));
        cases.emplace_back(new test_mul_mat_id(type, GGML_TYPE_F32, 8, 3, false, 33, n, 512));
    }
    cases.emplace_back(new test_get_rows(type, 768, 80, 7, 2, 3, true));
    cases.emplace_back(new test_cpy(type, GGML_TYPE_F32, { 512, 5, 3, 2 }));
}

static void ggml_ext_backend_ops_fq4_cases(std::vector<std::unique_ptr<test_case>> & cases) {
    ggml_ext_backend_ops_fq4_mul_mat_cases(cases);
    ggml_ext_backend_ops_fq4_fusion_cases(cases, GGML_TYPE_FQ4, 512);
    ggml_ext_backend_ops_fq4_fusion_cases(cases, GGML_TYPE_FQ4_64, 576);
    ggml_ext_backend_ops_fq3_cases(cases);
    ggml_ext_backend_ops_fq4_64_cases(GGML_TYPE_FQ4_64, cases);
    ggml_ext_backend_ops_fq4_64_cases(GGML_TYPE_FQ3_64, cases);
    cases.emplace_back(new test_get_rows(GGML_TYPE_FQ4, 256, 5, 4, 1, 1, false));
    cases.emplace_back(new test_get_rows(GGML_TYPE_FQ4, 768, 80, 7, 2, 3, true));
    cases.emplace_back(new test_cpy(GGML_TYPE_FQ4, GGML_TYPE_F32, { 512, 5, 3, 2 }));
}

static void ggml_ext_backend_ops_fq4_perf_cases(std::vector<std::unique_ptr<test_case>> & cases) {
    for (ggml_type type : { GGML_TYPE_FQ4, GGML_TYPE_Q4_0, GGML_TYPE_Q4_K, GGML_TYPE_IQ4_XS }) {
        for (int n : { 1, 2, 4, 8, 512 }) {
            cases.emplace_back(new test_mul_mat(type, GGML_TYPE_F32, 4096, n, 14336, { 1, 1 }, { 1, 1 }));
            cases.emplace_back(new test_mul_mat(type, GGML_TYPE_F32, 14336, n, 4096, { 1, 1 }, { 1, 1 }));
        }
        for (int m : { 1024, 4096, 128256 }) {
            cases.emplace_back(new test_mul_mat(type, GGML_TYPE_F32, m, 1, 4096, { 1, 1 }, { 1, 1 }));
        }
        for (int n : { 1, 8, 512 }) {
            cases.emplace_back(new test_mul_mat_id(type, GGML_TYPE_F32, 128, 8, true, 768, n, 2048));
        }
        cases.emplace_back(new test_mul_mat_vec_fusion(type, GGML_GLU_OP_SWIGLU, 1, 14336, 4096, false, 1, 1, false,
                                                       false, true, false, { 1, 1 }));
    }
}
