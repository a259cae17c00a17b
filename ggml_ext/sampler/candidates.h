// The candidates that the stages of the fused sampler have left: logits and ids in ascending order of the ids, and
// the temperature so far. Nothing is copied before a stage drops something.

#pragma once

#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace ggml_ext_sampling {

class candidates {
  public:
    explicit candidates(const kernels & k) : k(k) {}

    // All tokens of a vocabulary; the logits must stay where they are, and fill(i, count) puts each block there before
    // it is first read. False if one is NaN or +Inf, or none is finite; -Inf is no candidate.
    template <class Fill> bool start(const float * logits, int32_t n_vocab, Fill fill) {
        begin(logits, n_vocab);
        bool numbers = true;
        for (int32_t i = 0; i < n; i += block_size) {
            fill(i, std::min(block_size, n - i));
            numbers = measure_block(i) && numbers;
        }
        return numbers && drop_infinite();
    }

    int32_t size() const { return n; }

    const float * logits() const { return l; }

    int32_t id(int32_t i) const { return ids ? ids[i] : i; }

    // The largest logit, and one that is not above the smallest.
    float max() const { return most; }

    float min() const { return least; }

    double temperature() const { return t; }

    void set_temperature(double value) { t = value; }

    scale weight_scale() const { return { double(most), 1.0 / t }; }

    // Largest logits of the blocks of candidates.
    const std::vector<float> & block_maxima();

    // Keeps the logits >= value; at least one must be.
    void keep_from(float value);

    // Keeps the first candidate with the largest logit.
    void keep_largest();

    // Keeps the candidates i with keep(logit, i); at least one must be.
    template <class Keep> void keep_if(Keep keep) {
        reserve();
        int32_t count = 0;
        for (int32_t i = 0; i < n; i++) {
            const float   value    = l[i];
            const int32_t id_of    = id(i);
            const bool    kept     = keep(value, i);
            own_l[size_t(count)]   = value;
            own_ids[size_t(count)] = id_of;
            count += kept;
        }
        own(count);
        measure();
    }

  private:
    void begin(const float * logits, int32_t n_vocab);
    bool drop_infinite();
    void measure();
    void begin_measure();
    bool measure_block(int32_t first);
    void reserve();
    void own(int32_t count);

    const kernels & k;
    const float *   l        = nullptr;
    const int32_t * ids      = nullptr;  // null: 0, 1, ..
    int32_t         n        = 0;
    float           least    = 0;
    float           most     = 0;
    double          t        = 1;
    bool            measured = false;  // whether `maxima` is of the present candidates

    std::vector<float>   maxima;
    std::vector<float>   own_l;
    std::vector<int32_t> own_ids;
};

}  // namespace ggml_ext_sampling
