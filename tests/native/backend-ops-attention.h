// test-backend-ops: attention with many queries (cuda/attention/prefill/prefill.cuh) over upstream's own test_flash_attn_ext. Set
// GGML_EXT_ATTN: half or full for quantised caches, half/f16 or full/f16 for f16 ones too; else those are upstream's kernels.

#pragma once

static void ggml_ext_backend_ops_attention_cases(std::vector<std::unique_ptr<test_case>> & cases) {
    const auto add = [&](int64_t d, int64_t heads, std::array<int64_t, 2> repeat, int64_t kv, int64_t nb, ggml_type k,
                         ggml_type v, bool mask = true, bool sinks = false, float max_bias = 0.0f,
                         float softcap = 0.0f) {
        // As llama.cpp has its cache: the heads of a token are adjacent.
        cases.emplace_back(new test_flash_attn_ext(d, d, heads, repeat, kv, nb, mask, sinks, max_bias, softcap,
                                                   GGML_PREC_F32, k, v, { 0, 2, 1, 3 }));
    };
    const ggml_type q8 = GGML_TYPE_Q8_0, q4 = GGML_TYPE_Q4_0, f16 = GGML_TYPE_F16;
    for (int64_t d : { 64, 96, 128, 256 }) {
        add(d, 2, { 1, 1 }, 512, 64, q8, q8);
        add(d, 1, { 4, 1 }, 1024, 75, q8, q4);
        add(d, 1, { 8, 2 }, 577, 33, q4, q8);
        add(d, 1, { 3, 1 }, 768, 350, f16, f16);
        add(d, 1, { 2, 1 }, 640, 70, q8, q8, true, true);
        add(d, 1, { 4, 1 }, 600, 40, q8, q8, true, false, 8.0f);
        add(d, 1, { 1, 2 }, 1280, 129, q8, q8, true, true, 8.0f, 10.0f);
        add(d, 2, { 2, 1 }, 513, 65, q4, q4, false);
    }
}

// The acceptance shapes: 32 heads over 8 of K and V.
static void ggml_ext_backend_ops_attention_perf_cases(std::vector<std::unique_ptr<test_case>> & cases) {
    for (ggml_type type : { GGML_TYPE_Q8_0, GGML_TYPE_F16 }) {
        for (int64_t kv : { 4096, 32768 }) {
            for (int64_t nb : { 512, 4096 }) {
                cases.emplace_back(new test_flash_attn_ext(128, 128, 8, { 4, 1 }, kv, nb, true, false, 0.0f, 0.0f,
                                                           GGML_PREC_F32, type, type, { 0, 2, 1, 3 }));
            }
        }
    }
}
