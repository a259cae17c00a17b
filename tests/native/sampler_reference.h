// What the fused sampler has to keep: upstream's stages (src/llama-sampler.cpp) by full sorts, with sums and
// exponentials in long double and without upstream's float roundings. Ties go to the lower id. Where upstream keeps
// tokens of probability 0 (logit -Inf), they are no candidates here.

#pragma once

#include "ggml-ext.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

struct reference_token {
    int32_t     id;
    float       logit;
    long double p;  // probability; between the stages the weight exp(x), so that equal ones sum exactly
};

// Logits as temperature has left them, and probabilities from them.
class sampler_reference {
  public:
    // Kept tokens in ascending order of ids; empty if a logit is NaN or +Inf or none is finite.
    static std::vector<reference_token> kept(const std::vector<float> &      logits,
                                             const ggml_ext_sampler_params & params) {
        sampler_reference r;
        for (size_t i = 0; i < logits.size(); i++) {
            if (std::isnan(logits[i]) || logits[i] == INFINITY) {
                return {};
            }
            if (logits[i] != -INFINITY) {
                r.tokens.push_back({ int32_t(i), logits[i], 0 });
            }
        }
        for (int32_t i = 0; i < params.n_stages && !r.tokens.empty(); i++) {
            r.run(params.stages[i], params);
        }
        const long double total = r.weigh();
        for (auto & t : r.tokens) {
            t.p /= total;
        }
        std::sort(r.tokens.begin(), r.tokens.end(), [](auto & a, auto & b) { return a.id < b.id; });
        return r.tokens;
    }

  private:
    std::vector<reference_token> tokens;
    long double                  temperature = 1;

    void run(int32_t stage, const ggml_ext_sampler_params & params) {
        switch (stage) {
            case GGML_EXT_SAMPLER_TOP_K:
                return top_k(params.top_k);
            case GGML_EXT_SAMPLER_TYPICAL:
                return typical(params.typical_p, params.min_keep);
            case GGML_EXT_SAMPLER_TOP_P:
                return top_p(params.top_p, params.min_keep);
            case GGML_EXT_SAMPLER_MIN_P:
                return min_p(params.min_p, params.min_keep);
            case GGML_EXT_SAMPLER_TEMPERATURE:
                if (params.temperature > 0) {
                    temperature = params.temperature;
                } else {
                    sort();
                    tokens.resize(1);
                }
        }
    }

    void sort() {
        std::stable_sort(tokens.begin(), tokens.end(),
                         [](auto & a, auto & b) { return a.logit != b.logit ? a.logit > b.logit : a.id < b.id; });
    }

    // Weights; returns their sum.
    long double weigh() {
        long double max = -INFINITY;
        long double sum = 0;
        for (const auto & t : tokens) {
            max = std::max(max, (long double) t.logit);
        }
        for (auto & t : tokens) {
            t.p = std::exp((t.logit - max) / temperature);
            sum += t.p;
        }
        return sum;
    }

    void top_k(int32_t k) {
        if (k > 0 && size_t(k) < tokens.size()) {
            sort();
            tokens.resize(size_t(k));
        }
    }

    void top_p(float p, size_t min_keep) {
        if (p >= 1) {
            return;
        }
        sort();
        const long double total = weigh();
        long double       sum   = 0;
        for (size_t i = 0; i < tokens.size(); i++) {
            sum += tokens[i].p;
            if (sum >= p * total && i + 1 >= min_keep) {
                tokens.resize(i + 1);
            }
        }
    }

    void min_p(float p, size_t min_keep) {
        if (p <= 0) {
            return;
        }
        sort();
        const long double max   = tokens[0].logit;
        const long double least = std::log((long double) p);
        size_t            n     = 1;
        while (n < tokens.size() && ((tokens[n].logit - max) / temperature >= least || n < min_keep)) {
            n++;
        }
        tokens.resize(n);
    }

    void typical(float p, size_t min_keep) {
        if (p >= 1) {
            return;
        }
        sort();
        const long double total   = weigh();
        long double       entropy = 0;
        for (const auto & t : tokens) {
            entropy -= t.p > 0 ? t.p / total * std::log(t.p / total) : 0;
        }
        // Tokens whose weight underflows are infinitely far from the entropy, in the order of the logits.
        std::vector<std::pair<long double, reference_token>> by_distance;
        for (const auto & t : tokens) {
            by_distance.push_back({ std::fabs(-std::log(t.p / total) - entropy), t });
        }
        std::stable_sort(by_distance.begin(), by_distance.end(), [](auto & a, auto & b) { return a.first < b.first; });
        long double sum = 0;
        for (size_t i = 0; i < tokens.size(); i++) {
            tokens[i] = by_distance[i].second;
            sum += tokens[i].p;
            if (sum > p * total && i + 1 >= min_keep) {
                tokens.resize(i + 1);
            }
        }
    }
};
