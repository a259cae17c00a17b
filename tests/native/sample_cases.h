// Rows for GGML_EXT_OP_SAMPLE: logits and parameters of its tests on the CPU and in the CUDA emulator.

#pragma once

#include "core/ext_op.h"
#include "sampler_reference.h"

#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

struct sample_logits {
    std::string        name;
    std::vector<float> values;
};

// The ways in which the logits of a vocabulary can lie.
inline std::vector<sample_logits> sample_vocabularies(int32_t n) {
    std::mt19937                    random(uint32_t(n) * 2654435761u + 3);
    std::normal_distribution<float> normal(0, 1);
    std::vector<sample_logits>      all;
    const auto                      add = [&](const char * name, auto value) {
        std::vector<float> values;
        for (int32_t i = 0; i < n; i++) {
            values.push_back(value(i));
        }
        all.push_back({ name, values });
    };
    add("normal", [&](int32_t) { return 3 * normal(random); });
    add("flat", [&](int32_t) { return 0.3f * normal(random); });
    add("peaked", [&](int32_t i) { return i % 37 == 5 ? 20 + normal(random) : 2 * normal(random); });
    add("one has all the mass", [&](int32_t i) { return i == n / 2 ? 90.0f : normal(random); });
    add("equal", [&](int32_t) { return -1.5f; });
    add("few values, both zeros", [&](int32_t i) { return i % 3 == 0 ? 0.0f : i % 3 == 1 ? -0.0f : float(i % 5); });
    add("some -Inf", [&](int32_t i) { return i % 2 == 0 ? -INFINITY : normal(random); });
    add("large and tiny", [&](int32_t i) { return i % 7 == 0 ? -1e38f * normal(random) : 1e-39f * float(i); });
    add("neighbouring floats",
        [&](int32_t i) { return std::nextafter(7.0f, i % 2 ? 8.0f : 6.0f) + float(i % 3) * 1e-6f; });
    add("only one finite", [&](int32_t i) { return i == n - 1 ? -3.0f : -INFINITY; });
    return all;
}

// Parameters in the order of the stages; off where they say so.
inline ggml_ext_sampler_params sample_stages(int32_t top_k, float top_p, float min_p, size_t min_keep,
                                             float temperature) {
    ggml_ext_sampler_params params = {};
    for (const int32_t stage :
         { GGML_EXT_SAMPLER_TOP_K, GGML_EXT_SAMPLER_TOP_P, GGML_EXT_SAMPLER_MIN_P, GGML_EXT_SAMPLER_TEMPERATURE }) {
        params.stages[params.n_stages++] = stage;
    }
    params.temperature = temperature;
    params.top_k       = top_k;
    params.top_p       = top_p;
    params.min_p       = min_p;
    params.typical_p   = 1.0f;
    params.min_keep    = min_keep;
    return params;
}

inline std::vector<ggml_ext_sampler_params> sample_settings() {
    std::vector<ggml_ext_sampler_params> all = {
        sample_stages(0, 1.0f, 0.0f, 0, 1.0f),           sample_stages(40, 0.95f, 0.05f, 0, 0.8f),
        sample_stages(1, 1.0f, 0.0f, 0, 2.0f),           sample_stages(7, 0.5f, 0.0f, 0, 1.0f),
        sample_stages(0, 0.95f, 0.0f, 0, 1.0f),          sample_stages(0, 0.3f, 0.0f, 9, 0.5f),
        sample_stages(0, 0.0f, 0.0f, 0, 1.0f),           sample_stages(0, 1.0f, 0.1f, 0, 1.5f),
        sample_stages(0, 1.0f, 0.9f, 12, 1.0f),          sample_stages(3, 0.9f, 0.9f, 12, 1.0f),
        sample_stages(0, 1.0f, 1.0f, 0, 1.0f),           sample_stages(0, 1.0f, 2.0f, 0, 1.0f),
        sample_stages(0, 0.7f, 0.2f, 100000, 1.0f),      sample_stages(20, 0.8f, 0.01f, 2, 0.0f),
        sample_stages(100000, 0.99999f, 1e-6f, 0, 5.0f),
    };
    return all;
}

inline ggml_ext_sample_params sample_numbers(const ggml_ext_sampler_params & params, uint64_t uniform) {
    return { params.top_k,
             params.top_p,
             params.min_p > 0 ? std::log(double(params.min_p)) : -INFINITY,
             int32_t(params.min_keep),
             params.temperature,
             uniform };
}
