// Attention for few query tokens over a quantised cache: cases for upstream's test-backend-ops beside its own.
// Set GGML_EXT_ATTN=half; else those are upstream's kernels.

#pragma once

// K and V lie as llama.cpp's cache has them: heads side by side.
static test_case * ggml_ext_attention_decode_case(int64_t dim, int64_t heads_kv, std::array<int64_t, 2> repeat,
                                                  int64_t n_kv, int64_t n_q, ggml_type k, ggml_type v,
                                                  bool sinks = false, float max_bias = 0.0f, float softcap = 0.0f) {
    return new test_flash_attn_ext(dim, dim, heads_kv, repeat, n_kv, n_q, true, sinks, max_bias, softcap, GGML_PREC_F32,
                                   k, v, { 0, 2, 1, 3 });
}

static void ggml_ext_backend_ops_attention_decode_cases(std::vector<std::unique_ptr<test_case>> & cases) {
    const ggml_type types[] = { GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 };
    for (ggml_type k : types) {
        for (ggml_type v : types) {
            for (int64_t dim : { 64, 96, 128, 256 }) {
                cases.emplace_back(ggml_ext_attention_decode_case(dim, 2, { 4, 1 }, 300, 1, k, v));
                cases.emplace_back(ggml_ext_attention_decode_case(dim, 3, { 1, 2 }, 129, 8, k, v, true));
            }
            cases.emplace_back(ggml_ext_attention_decode_case(128, 1, { 16, 1 }, 4096, 2, k, v));
            cases.emplace_back(ggml_ext_attention_decode_case(64, 2, { 3, 1 }, 513, 4, k, v, true, 8.0f, 0.0f));
            cases.emplace_back(ggml_ext_attention_decode_case(256, 1, { 2, 1 }, 77, 3, k, v, false, 0.0f, 10.0f));
        }
    }
}

// Heads as in 8-billion-parameter models of the Llama 3 kind; f16 is upstream's.
static void ggml_ext_backend_ops_attention_decode_perf_cases(std::vector<std::unique_ptr<test_case>> & cases) {
    for (ggml_type type : { GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_F16 }) {
        for (int64_t n_kv : { 4096, 32768, 131072 }) {
            for (int64_t n_q : { 1, 4, 8 }) {
                cases.emplace_back(ggml_ext_attention_decode_case(128, 8, { 4, 1 }, n_kv, n_q, type, type));
            }
        }
    }
}
