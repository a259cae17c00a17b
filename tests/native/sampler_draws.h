// Whether draws have the distribution of the reference: a sweep of the uniform number, and chi-square over many
// configurations with a Kolmogorov-Smirnov test over their p-values. Seeds are fixed: a result never changes by chance.

#pragma once

#include "sampler/generator.h"
#include "sampler_cases.h"

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

// Empty, or the first u at which the token is not the one at u of the reference's cumulative distribution in ascending
// order of ids. Looks at a grid of u and closely around every step; at a step itself both its tokens are right.
template <class Rules> std::string sweep_problem(const sampler_case & c) {
    ggml_ext_sampling::selection<Rules> select(ggml_ext_sampling::kernels_best());
    const std::vector<reference_token>  expected = sampler_reference::kept(c.logits, c.params);
    if (!select.run(c.logits.data(), int32_t(c.logits.size()), c.params)) {
        return expected.empty() ? "" : "refused";
    }
    std::vector<double>      us = { 0.0, 1 - 0x1p-53 };
    std::vector<long double> ends;
    long double              sum = 0;
    for (const reference_token & token : expected) {
        sum += token.p;
        ends.push_back(sum);
        for (const double u : { double(sum) - 1e-11, double(sum) + 1e-11 }) {
            if (u >= 0 && u < 1) {
                us.push_back(u);
            }
        }
    }
    for (int i = 0; i < 1000; i++) {
        us.push_back(i / 1000.0);
    }
    for (const double u : us) {
        const int32_t id = select.kept().id(select.draw(u));
        size_t        i  = 0;
        while (i < expected.size() && expected[i].id != id) {
            i++;
        }
        if (i == expected.size() || expected[i].p <= 0 || u > ends[i] + 1e-12L ||
            u < ends[i] - expected[i].p - 1e-12L) {
            return "u = " + std::to_string(u) + " gives token " + std::to_string(id);
        }
    }
    return "";
}

// Probability that chi-square with k degrees of freedom is above x: the regularised upper incomplete gamma function
// Q(k/2, x/2), by its series below the mean and by its continued fraction above (DLMF 8.7.1, 8.9.2).
inline double chi_square_tail(double x, double k) {
    const double a = k / 2, z = x / 2;
    const double front = std::exp(a * std::log(z) - z - std::lgamma(a));
    if (z <= 0) {
        return 1;
    }
    if (z < a + 1) {
        double term = 1 / a, sum = term;
        for (int n = 1; term > sum * 1e-16; n++) {
            term *= z / (a + n);
            sum += term;
        }
        return 1 - front * sum;
    }
    double b = z + 1 - a, c = 1e300, d = 1 / b, value = d;
    for (int n = 1; n < 10000; n++) {
        const double an = -n * (n - a);
        b += 2;
        d                   = 1 / (an * d + b);
        c                   = b + an / c;
        const double change = c * d;
        value *= change;
        if (std::fabs(change - 1) < 1e-15) {
            break;
        }
    }
    return front * value;
}

// P-value of counts (by token) against the reference: tokens with an expected count below 5 go into one cell. 0 if a
// token was drawn that has no probability, -1 if there is but one cell, which every count fits.
inline double counts_p_value(const std::vector<reference_token> & expected, const std::vector<int64_t> & counts) {
    int64_t draws = 0, seen = 0;
    for (const int64_t count : counts) {
        draws += count;
    }
    double     x = 0, rest = 0, rest_count = 0;
    int        cells = 0;
    const auto add   = [&](double count, double mean) {
        x += (count - mean) * (count - mean) / mean;
        cells++;
    };
    for (const reference_token & token : expected) {
        const double mean  = double(token.p) * double(draws);
        const auto   count = counts[size_t(token.id)];
        seen += count;
        if (mean >= 5) {
            add(double(count), mean);
        } else {
            rest += mean;
            rest_count += double(count);
        }
    }
    if (seen != draws) {
        return 0;
    }
    if (rest >= 5) {
        add(rest_count, rest);
    } else if (rest_count > 50) {
        return 0;
    }
    return cells < 2 ? -1 : chi_square_tail(x, cells - 1);
}

// A configuration of all stages, drawn from a seed, that keeps at least two tokens.
inline sampler_case draw_case(uint32_t seed) {
    std::mt19937 random(seed);
    const auto uniform = [&](float from, float to) { return std::uniform_real_distribution<float>(from, to)(random); };
    for (;;) {
        const int32_t      n         = seed % 10 == 9 ? 3000 : 4 + int32_t(random() % 200);
        const float        deviation = uniform(0.2f, 3);
        std::vector<float> logits(static_cast<size_t>(n));
        for (float & l : logits) {
            l = std::normal_distribution<float>(0, deviation)(random);
            l = seed % 4 == 0 ? std::round(l) : l;
        }
        ggml_ext_sampler_params params = no_stages();
        std::vector<int32_t>    stages = { TOP_K, TYPICAL, TOP_P, MIN_P, TEMPERATURE };
        std::shuffle(stages.begin(), stages.end(), random);
        params.n_stages = 1 + int32_t(random() % 5);
        std::copy(stages.begin(), stages.begin() + params.n_stages, params.stages);
        params.temperature      = uniform(0.5f, 2);
        params.top_k            = 2 + int32_t(random() % uint32_t(n));
        params.top_p            = uniform(0.5f, 1);
        params.typical_p        = uniform(0.5f, 1);
        params.min_p            = uniform(0, 0.05f);
        const sampler_case made = { "draws " + std::to_string(seed), logits, params };
        if (sampler_reference::kept(logits, params).size() > 1) {
            return made;
        }
    }
}

// P-values of `draws` draws each of the configurations 0 .. n_cases - 1.
template <class Rules> std::vector<double> draw_p_values(int n_cases, int64_t draws) {
    std::vector<double> values;
    for (int i = 0; i < n_cases; i++) {
        const sampler_case                  c = draw_case(uint32_t(i));
        ggml_ext_sampling::selection<Rules> select(ggml_ext_sampling::kernels_best());
        ggml_ext_sampling::generator        random(uint32_t(1000 + i));
        std::vector<int64_t>                counts(c.logits.size());
        select.run(c.logits.data(), int32_t(c.logits.size()), c.params);
        for (int64_t j = 0; j < draws; j++) {
            counts[size_t(select.kept().id(select.draw(random.uniform())))]++;
        }
        values.push_back(counts_p_value(sampler_reference::kept(c.logits, c.params), counts));
    }
    return values;
}

// Largest distance of the values' distribution from the uniform one, times sqrt(n): above 1.95 once in a thousand.
inline double kolmogorov_smirnov(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    double       distance = 0;
    const double n        = double(values.size());
    for (size_t i = 0; i < values.size(); i++) {
        distance = std::max({ distance, values[i] - double(i) / n, double(i + 1) / n - values[i] });
    }
    return distance * std::sqrt(n);
}

constexpr double kolmogorov_smirnov_limit = 1.95;

// Under the sanitizers, which are slow, a hundredth.
#ifdef __SANITIZE_ADDRESS__
constexpr int64_t draws_per_case = 10000;
#else
constexpr int64_t draws_per_case = 1000000;
#endif
