// The stages of the fused sampler, one after the other on the candidates that the one before has left, and the draw.

#pragma once

#include "cut.h"
#include "draw.h"
#include "ggml-ext.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

namespace ggml_ext_sampling {

template <class Rules> class selection {
  public:
    explicit selection(const kernels & k) : c(k), cuts(k, c), weights(k, c) {}

    // Its parts refer to one another.
    selection(const selection &)             = delete;
    selection & operator=(const selection &) = delete;

    // As candidates::start.
    template <class Fill> bool start(const float * logits, int32_t n_vocab, Fill fill) {
        return c.start(logits, n_vocab, fill);
    }

    // The stages, on what has been started.
    void run_stages(const ggml_ext_sampler_params & params);

    // Both, on logits that are there already.
    bool run(const float * logits, int32_t n_vocab, const ggml_ext_sampler_params & params) {
        const bool started = start(logits, n_vocab, [](int32_t, int) {});
        if (started) {
            run_stages(params);
        }
        return started;
    }

    const candidates & kept() const { return c; }

    // As distribution.
    template <class Write> void probabilities(Write write) { weights.probabilities(write); }

    int32_t draw(double u) { return weights.draw(u); }

  private:
    void run_stage(int32_t stage, const ggml_ext_sampler_params & params);
    void top_k(int32_t count);
    void top_p(double p, int32_t min_keep);
    void min_p(double p, int32_t min_keep);
    void typical(double p, int32_t min_keep);
    void keep_prefix(const cut & end);

    candidates          c;
    cut_finder<Rules>   cuts;
    distribution<Rules> weights;
    std::vector<float>  maxima;  // of the blocks, in an order of their own
};

template <class Rules> void selection<Rules>::run_stages(const ggml_ext_sampler_params & params) {
    for (int32_t i = 0; i < params.n_stages; i++) {
        run_stage(params.stages[i], params);
    }
    weights.weigh();
}

template <class Rules> void selection<Rules>::run_stage(int32_t stage, const ggml_ext_sampler_params & params) {
    const int32_t min_keep = int32_t(std::min<size_t>(params.min_keep, INT32_MAX));
    switch (stage) {
        case GGML_EXT_SAMPLER_TOP_K:
            return top_k(params.top_k);
        case GGML_EXT_SAMPLER_TYPICAL:
            return typical(params.typical_p, min_keep);
        case GGML_EXT_SAMPLER_TOP_P:
            return top_p(params.top_p, min_keep);
        case GGML_EXT_SAMPLER_MIN_P:
            return min_p(params.min_p, min_keep);
        default:  // GGML_EXT_SAMPLER_TEMPERATURE
            return params.temperature <= 0 ? c.keep_largest() : c.set_temperature(params.temperature);
    }
}

template <class Rules> void selection<Rules>::top_k(int32_t count) {
    if (count <= 0 || count >= c.size()) {
        return;
    }
    // `count` blocks have a largest logit of at least the count-th of these, so the cut is not below it.
    maxima = c.block_maxima();
    if (size_t(count) <= maxima.size() / 2) {
        std::nth_element(maxima.begin(), maxima.begin() + (count - 1), maxima.end(), std::greater<float>());
        c.keep_from(maxima[size_t(count - 1)]);
    }
    if (count < c.size()) {
        keep_prefix(cuts.find({ 0, 0, false, count }));
    }
}

template <class Rules> void selection<Rules>::top_p(double p, int32_t min_keep) {
    if (p >= 1 || min_keep >= c.size()) {
        return;
    }
    cut end = cuts.find({ 0, p, false, 0 });
    if (min_keep > 1) {
        const cut least = cuts.find({ 0, 0, false, min_keep });
        end             = Rules::before(end.last, least.last) ? least : end;
    }
    keep_prefix(end);
}

template <class Rules> void selection<Rules>::min_p(double p, int32_t min_keep) {
    if (p <= 0 || min_keep >= c.size()) {
        return;
    }
    if (p > 1) {
        return top_k(std::max(1, min_keep));
    }
    const double limit = std::max(double(c.min()), double(c.max()) + c.temperature() * std::log(p));
    float        least = float(limit);  // the smallest float that is not below the limit
    if (double(least) < limit) {
        least = std::nextafter(least, c.max());
    }
    if (min_keep > 1) {
        const cut end = cuts.find({ 0, 0, false, min_keep });
        if (end.last.logit < least) {
            return keep_prefix(end);
        }
    }
    c.keep_from(least);
}

// Locally typical sampling (arXiv 2202.00666): with p = exp(x) / S, |-ln p - H| = |x - sum of p x|.
template <class Rules> void selection<Rules>::typical(double p, int32_t min_keep) {
    if (p >= 1 || min_keep >= c.size()) {
        return;
    }
    const double center = cuts.mean_of_x();
    cut          end    = cuts.find({ center, p, true, 0 });
    if (min_keep > 1) {
        const cut least = cuts.find({ center, 0, false, min_keep });
        end             = Rules::before(end.last, least.last) ? least : end;
    }
    c.keep_if([&](float logit, int32_t i) {
        const item candidate = { std::fabs(cuts.x_of(logit) - center), 0, logit, i };
        return !Rules::before(end.last, candidate);
    });
}

template <class Rules> void selection<Rules>::keep_prefix(const cut & end) {
    const int32_t last_id = c.id(end.last.index);
    c.keep_from(end.last.logit);
    if (end.tied) {
        c.keep_if(
            [&](float logit, int32_t i) { return logit != end.last.logit || Rules::keeps_tied(c.id(i), last_id); });
    }
}

}  // namespace ggml_ext_sampling
