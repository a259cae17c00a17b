// Logits and parameters that the kept set is compared on, and the comparison. Included by the tests of the fused
// sampler and by that of its mutants, which must fail it.

#pragma once

#include "sampler/select.h"
#include "sampler_reference.h"

#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

struct sampler_case {
    std::string             name;
    std::vector<float>      logits;
    ggml_ext_sampler_params params;
};

enum : int32_t {
    TOP_K       = GGML_EXT_SAMPLER_TOP_K,
    TYPICAL     = GGML_EXT_SAMPLER_TYPICAL,
    TOP_P       = GGML_EXT_SAMPLER_TOP_P,
    MIN_P       = GGML_EXT_SAMPLER_MIN_P,
    TEMPERATURE = GGML_EXT_SAMPLER_TEMPERATURE,
};

inline ggml_ext_sampler_params no_stages() {
    return { 0, {}, 1.0f, 0, 1.0f, 0.0f, 1.0f, 0, 1 };
}

inline ggml_ext_sampler_params with_stages(std::initializer_list<int32_t> stages) {
    ggml_ext_sampler_params params = no_stages();
    for (const int32_t stage : stages) {
        params.stages[params.n_stages++] = stage;
    }
    return params;
}

inline ggml_ext_sampler_params with_top_k(int32_t k) {
    ggml_ext_sampler_params params = with_stages({ TOP_K });
    params.top_k                   = k;
    return params;
}

inline ggml_ext_sampler_params with_top_p(float p, size_t min_keep = 0) {
    ggml_ext_sampler_params params = with_stages({ TOP_P });
    params.top_p                   = p;
    params.min_keep                = min_keep;
    return params;
}

inline ggml_ext_sampler_params with_min_p(float p, size_t min_keep = 0) {
    ggml_ext_sampler_params params = with_stages({ MIN_P });
    params.min_p                   = p;
    params.min_keep                = min_keep;
    return params;
}

inline ggml_ext_sampler_params with_typical(float p, size_t min_keep = 0) {
    ggml_ext_sampler_params params = with_stages({ TYPICAL });
    params.typical_p               = p;
    params.min_keep                = min_keep;
    return params;
}

inline ggml_ext_sampler_params with_temperature(float temperature) {
    ggml_ext_sampler_params params = with_stages({ TEMPERATURE });
    params.temperature             = temperature;
    return params;
}

// The ways in which the logits of a vocabulary can lie.
inline std::vector<std::pair<std::string, std::vector<float>>> sampler_logits(int32_t n) {
    std::mt19937                                            generator(uint32_t(n) * 2654435761u + 1);
    std::normal_distribution<float>                         normal(0, 1);
    std::vector<std::pair<std::string, std::vector<float>>> all;
    const auto                                              add = [&](const char * name, auto value) {
        std::vector<float> logits;
        for (int32_t i = 0; i < n; i++) {
            logits.push_back(value(i));
        }
        all.push_back({ std::string(name) + " " + std::to_string(n), logits });
    };
    const int32_t only = n / 2;
    add("flat", [&](int32_t) { return normal(generator); });
    add("nearly equal", [&](int32_t) { return 1.0f + 1e-6f * normal(generator); });
    add("peaked", [&](int32_t i) { return 3 * normal(generator) + (i % 97 == 3 ? 12.0f : 0.0f); });
    add("equal", [&](int32_t) { return 0.25f; });
    add("few values", [&](int32_t) { return std::round(2 * normal(generator)); });
    add("two values", [&](int32_t i) { return i % 3 == 0 ? 1.0f : -1.0f; });
    add("one token", [&](int32_t i) { return i == only ? 200.0f : -200.0f; });
    add("one finite", [&](int32_t i) { return i == only ? -3.0f : -INFINITY; });
    add("half masked", [&](int32_t i) { return i % 2 ? normal(generator) : -INFINITY; });
    add("masked by -1e30", [&](int32_t i) { return i % 2 ? normal(generator) : -1e30f; });
    add("ascending", [&](int32_t i) { return float(i) * 0.01f; });
    add("descending", [&](int32_t i) { return float(-i) * 0.01f; });
    add("wide", [&](int32_t i) { return std::ldexp(i % 2 ? 1.0f : -1.0f, i % 120); });
    add("ties below the top", [&](int32_t i) { return i % 5 == 0 ? 2.0f + normal(generator) : 1.0f; });
    return all;
}

inline std::vector<sampler_case> sampler_cases(int32_t n) {
    std::vector<std::pair<std::string, ggml_ext_sampler_params>> settings = {
        { "none", no_stages() }
    };
    for (const int32_t k : { -1, 0, 1, 2, 7, 40, n / 3, n - 1, n, n + 1 }) {
        settings.push_back({ "top-k " + std::to_string(k), with_top_k(k) });
    }
    for (const float p : { -1.0f, 0.0f, 1e-6f, 0.25f, 0.5f, 0.75f, 0.95f, 0.999999f, 1.0f, 2.0f }) {
        settings.push_back({ "top-p " + std::to_string(p), with_top_p(p) });
        settings.push_back({ "typical " + std::to_string(p), with_typical(p) });
        settings.push_back({ "min-p " + std::to_string(p), with_min_p(p) });
    }
    for (const size_t least : { size_t(1), size_t(2), size_t(n) / 2, size_t(n), SIZE_MAX }) {
        const std::string name = " 0.3, at least " + std::to_string(least);
        settings.push_back({ "top-p" + name, with_top_p(0.3f, least) });
        settings.push_back({ "typical" + name, with_typical(0.3f, least) });
        settings.push_back({ "min-p" + name, with_min_p(0.3f, least) });
        settings.push_back({ "min-p 1.5, at least " + std::to_string(least), with_min_p(1.5f, least) });
    }
    for (const float t : { -1.0f, 0.0f, 1e-30f, 0.01f, 0.8f, 1.0f, 3.0f, 1e30f }) {
        settings.push_back({ "temperature " + std::to_string(t), with_temperature(t) });
    }
    for (const auto & order : {
             std::initializer_list<int32_t>{ TOP_K, TYPICAL, TOP_P, MIN_P, TEMPERATURE },
             std::initializer_list<int32_t>{ TEMPERATURE, TOP_P, MIN_P },
             std::initializer_list<int32_t>{ TEMPERATURE, TYPICAL, MIN_P, TOP_K },
             std::initializer_list<int32_t>{ TYPICAL, TOP_P },
             std::initializer_list<int32_t>{ MIN_P, TEMPERATURE, TOP_P, TYPICAL, TOP_K },
             std::initializer_list<int32_t>{ TOP_P, TYPICAL, TOP_K }
    }) {
        for (const float t : { 0.0f, 0.7f, 2.5f }) {
            ggml_ext_sampler_params params = with_stages(order);
            params.temperature             = t;
            params.top_k                   = n / 2 + 1;
            params.top_p                   = 0.9f;
            params.min_p                   = 0.02f;
            params.typical_p               = 0.8f;
            settings.push_back(
                { "order " + std::to_string(order.begin()[0]) + std::to_string(order.begin()[1]) + "..", params });
        }
    }
    std::vector<sampler_case> cases;
    for (const auto & logits : sampler_logits(n)) {
        for (const auto & setting : settings) {
            cases.push_back({ logits.first + ", " + setting.first, logits.second, setting.second });
        }
    }
    return cases;
}

// Empty, or what differs from the expected tokens of the reference: a kept token or a probability (allowed, in float:
// half of the last bit, and the smallest normal number).
template <class Rules>
std::string kept_problem(const ggml_ext_sampling::kernels & k, const sampler_case & c,
                         const std::vector<reference_token> & expected) {
    ggml_ext_sampling::selection<Rules> select(k);
    if (!select.run(c.logits.data(), int32_t(c.logits.size()), c.params)) {
        return expected.empty() ? "" : "refused";
    }
    const auto & kept = select.kept();
    if (size_t(kept.size()) != expected.size()) {
        return "keeps " + std::to_string(kept.size()) + ", not " + std::to_string(expected.size());
    }
    std::string problem;
    select.probabilities([&](int32_t first, int n, const float * p) {
        for (int i = 0; i < n && problem.empty(); i++) {
            const reference_token & token = expected[size_t(first + i)];
            if (kept.id(first + i) != token.id || kept.logits()[first + i] != token.logit) {
                problem =
                    "keeps token " + std::to_string(kept.id(first + i)) + " in place of " + std::to_string(token.id);
            } else if (!(std::fabs(p[i] - token.p) <= 6.1e-8L * token.p + 1.2e-38L)) {
                problem = "token " + std::to_string(token.id) + " has p " + std::to_string(p[i]);
            }
        }
    });
    return problem;
}
