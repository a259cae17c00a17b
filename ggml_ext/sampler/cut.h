// Finds where a prefix of the candidates ends, in the order of a key: largest logit first for top-k, top-p and min-p
// (key -x, x = (logit - max) / temperature), nearest to the mean of x first for typical (key |x - mean|). The prefix is
// the shortest that reaches a count or a mass. Nothing is sorted but the few candidates near its end, the cut: a
// histogram of the keys says in which bucket the cut lies, and only that bucket is looked at closely.
//
// Weights are exp(x) in double. docs/sampling.md says how near to the cut the sums can be wrong.

#pragma once

#include "candidates.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <iterator>
#include <numeric>
#include <vector>

namespace ggml_ext_sampling {

// A candidate as the stages order it.
struct item {
    double  key;
    double  weight;
    float   logit;
    int32_t index;  // ascending with the id
};

// The decisions that tests/native/test_sampler_mutants.cpp gets wrong on purpose, to see that the checks notice.
struct rules {
    static bool before(const item & a, const item & b) {
        return a.key != b.key ? a.key < b.key : a.logit != b.logit ? a.logit > b.logit : a.index < b.index;
    }

    static bool reached(double sum, double target, bool strict) { return strict ? sum > target : sum >= target; }

    // The sum from which the candidates of a bucket are counted on.
    static double lower_pivot(double below, double /*bucket*/) { return below; }

    // The last kept place, where the sum reaches the target at `crossing`.
    static size_t last_kept(size_t crossing) { return crossing; }

    // Whether a candidate with the logit of the last kept one is kept.
    static bool keeps_tied(int32_t id, int32_t last_id) { return id <= last_id; }

    static double draw_target(double u, double total) { return u * total; }
};

// A prefix in the order of the keys |x - center|: `count` candidates or, if that is 0, as many as hold `fraction`
// of the weight (strict: more than it).
struct goal {
    double  center;
    double  fraction;
    bool    strict;
    int32_t count;
};

struct cut {
    item last;  // of the prefix
    bool tied;  // candidates with its logit come after it
};

template <class Rules> class cut_finder {
  public:
    cut_finder(const kernels & k, candidates & c) : k(k), c(c) {}

    cut find(const goal & g);

    // The mean of x over the candidates, by their weights.
    double mean_of_x();

    double x_of(float logit) const {
        const scale s = c.weight_scale();
        return (double(logit) - s.max) * s.inv_t;
    }

  private:
    static constexpr size_t n_buckets = 1024;
    static constexpr size_t list_most = 1024;  // so many candidates become items without a histogram of all
    static constexpr size_t sort_most = 128;   // more items than these are split before they are sorted

    // The head: about one candidate for each of so many blocks.
    static constexpr size_t  head_blocks = 128;
    static constexpr int32_t head_sample = 16;

    // Less than 1e-12 of the weight has larger keys, whatever the vocabulary: one bucket is enough there.
    static constexpr double mass_range = 40;

    bool   find_in_head(const goal & g, cut * end);
    cut    split_and_walk(double below, double target, bool strict);
    void   pick_from(float logit);
    double total_weight();
    double sampled_weight_below(float logit);
    double split_candidates(const goal & g, double range, double * target);
    void   pick_bucket(size_t bucket);
    bool   split_items(double * below, double target, bool strict);
    size_t find_bucket(double * below, double target, bool strict) const;
    void   make_items(const goal & g);

    double weight_of_items() const {
        return std::accumulate(items.begin(), items.end(), 0.0,
                               [](double sum, const item & i) { return sum + i.weight; });
    }

    const kernels &       k;
    candidates &          c;
    std::vector<item>     items;
    std::vector<int32_t>  picked;  // the candidates that become items, and their logits
    std::vector<float>    picked_logits;
    std::vector<uint16_t> bucket_of;
    std::vector<double>   histogram;
    std::vector<float>    maxima;  // of the blocks, in an order of their own
    double                block[block_size];
};

template <class Rules> cut cut_finder<Rules>::find(const goal & g) {
    const double farthest = std::max(std::fabs(g.center), std::fabs(x_of(c.min()) - g.center));
    const double range    = g.count ? farthest : std::min(farthest, mass_range);
    double       below    = 0;
    double       target   = g.count;
    cut          end;
    if (size_t(c.size()) > list_most && range > 0) {
        if (find_in_head(g, &end)) {
            return end;
        }
        below = split_candidates(g, range, &target);
    } else {
        pick_from(c.min());
        make_items(g);
        target = g.count ? target : g.fraction * weight_of_items();
    }
    return split_and_walk(below, target, g.strict);
}

// The cut among the largest logits. Top-p mostly ends there, and then a sum of all the weights is enough, without a
// histogram. Whether it is worth a try shows in a part of the blocks; false if not, or if the try has failed.
template <class Rules> bool cut_finder<Rules>::find_in_head(const goal & g, cut * end) {
    if (g.count || g.center != 0) {
        return false;
    }
    maxima            = c.block_maxima();
    const auto middle = maxima.begin() + ptrdiff_t(std::min(head_blocks, maxima.size() / 2));
    std::nth_element(maxima.begin(), middle, maxima.end(), std::greater<float>());
    const float least = *middle;
    pick_from(least);
    if (picked.size() > list_most) {
        return false;
    }
    make_items(g);
    const double head = weight_of_items();
    if (head < g.fraction * (head + sampled_weight_below(least))) {
        return false;
    }
    const double target = g.fraction * total_weight();
    if (!Rules::reached(head, target, g.strict)) {
        return false;
    }
    *end = split_and_walk(0, target, g.strict);
    return true;
}

template <class Rules> double cut_finder<Rules>::total_weight() {
    double sum = 0;
    for (int32_t i = 0; i < c.size(); i += block_size) {
        sum += k.weights(c.logits() + i, std::min(block_size, c.size() - i), c.weight_scale(), block);
    }
    return sum;
}

// The weight of the logits below one, from every head_sample-th block.
template <class Rules> double cut_finder<Rules>::sampled_weight_below(float logit) {
    double sum     = 0;
    int    sampled = 0;
    for (int32_t i = 0; i < c.size(); i += block_size * head_sample, sampled++) {
        const int n = std::min(block_size, c.size() - i);
        sum += k.weights(c.logits() + i, n, c.weight_scale(), block);
        for (int j = 0; j < n; j++) {
            sum -= c.logits()[i + j] >= logit ? block[j] : 0;
        }
    }
    return sum * double(c.block_maxima().size()) / sampled;
}

// The cut among the items, from the sum in front of the first; it is the last of them at the latest.
template <class Rules> cut cut_finder<Rules>::split_and_walk(double below, double target, bool strict) {
    while (items.size() > sort_most && split_items(&below, target, strict)) {
    }
    if (!std::is_sorted(items.begin(), items.end(), Rules::before)) {
        std::sort(items.begin(), items.end(), Rules::before);
    }
    size_t i = 0;
    for (; i + 1 < items.size(); i++) {
        below += items[i].weight;
        if (Rules::reached(below, target, strict)) {
            break;
        }
    }
    i = Rules::last_kept(i);
    return { items[i], i + 1 < items.size() && items[i + 1].logit == items[i].logit };
}

template <class Rules> void cut_finder<Rules>::pick_from(float logit) {
    const std::vector<float> & largest = c.block_maxima();
    picked.clear();
    for (int32_t i = 0; i < c.size(); i += block_size) {
        const int32_t to = largest[size_t(i / block_size)] >= logit ? std::min(c.size(), i + block_size) : i;
        for (int32_t j = i; j < to; j++) {
            if (c.logits()[j] >= logit) {
                picked.push_back(j);
            }
        }
    }
}

// Makes items of the candidates in the bucket of the cut; returns the sum in front of it.
template <class Rules> double cut_finder<Rules>::split_candidates(const goal & g, double range, double * target) {
    const scale     s = c.weight_scale();
    const bucketing b = { g.center, double(n_buckets) / range, int(n_buckets) };
    // Two histograms, for even and odd places: neighbours often share a bucket, and adding to it twice in a row waits.
    histogram.assign(2 * n_buckets, 0.0);
    double * const even = histogram.data();
    double * const odd  = even + n_buckets;
    bucket_of.resize(size_t(c.size()));
    std::fill(std::begin(block), std::end(block), 1.0);
    for (int32_t i = 0; i < c.size(); i += block_size) {
        const float * l  = c.logits() + i;
        const int     n  = std::min(block_size, c.size() - i);
        uint16_t *    to = bucket_of.data() + i;
        k.buckets(l, n, s, b, to);
        if (!g.count) {
            k.weights(l, n, s, block);
        }
        for (int j = 0; j + 1 < n; j += 2) {
            even[to[j]] += block[j];
            odd[to[j + 1]] += block[j + 1];
        }
        if (n % 2) {
            even[to[n - 1]] += block[n - 1];
        }
    }
    double sum = 0;
    for (size_t j = 0; j < n_buckets; j++) {
        even[j] += odd[j];
        sum += even[j];
    }
    *target = g.count ? double(g.count) : g.fraction * sum;

    double below = 0;
    pick_bucket(find_bucket(&below, *target, g.strict));
    make_items(g);
    return below;
}

template <class Rules> void cut_finder<Rules>::pick_bucket(size_t bucket) {
    picked.clear();
    for (int32_t i = 0; i < c.size(); i += block_size) {
        const uint16_t * in  = bucket_of.data() + i;
        const int        n   = std::min(block_size, c.size() - i);
        uint16_t         any = 0;
        for (int j = 0; j < n; j++) {
            any |= in[j] == bucket;
        }
        for (int j = 0; any && j < n; j++) {
            if (in[j] == bucket) {
                picked.push_back(i + j);
            }
        }
    }
}

// The bucket in which the sum, that starts from *below, reaches the target, or the last one with a weight; *below
// becomes the sum in front of it.
template <class Rules> size_t cut_finder<Rules>::find_bucket(double * below, double target, bool strict) const {
    double sum   = *below;
    size_t found = 0;
    for (size_t j = 0; j < n_buckets; j++) {
        if (histogram[j] > 0) {
            found  = j;
            *below = Rules::lower_pivot(sum, histogram[j]);
            sum += histogram[j];
            if (Rules::reached(sum, target, strict)) {
                break;
            }
        }
    }
    return found;
}

// Leaves the items of the bucket of the cut; false if all keys are equal.
template <class Rules> bool cut_finder<Rules>::split_items(double * below, double target, bool strict) {
    const auto   by_key = [](const item & a, const item & b) { return a.key < b.key; };
    const auto   ends   = std::minmax_element(items.begin(), items.end(), by_key);
    const double low    = ends.first->key;
    const double width  = ends.second->key - low;
    if (!(width > 0)) {
        return false;
    }
    const auto bucket = [&](const item & i) { return size_t((i.key - low) / width * double(n_buckets - 1)); };
    histogram.assign(n_buckets, 0.0);
    for (const item & i : items) {
        histogram[bucket(i)] += i.weight;
    }
    const size_t found = find_bucket(below, target, strict);
    items.erase(std::remove_if(items.begin(), items.end(), [&](const item & i) { return bucket(i) != found; }),
                items.end());
    return true;
}

// Items of the picked candidates.
template <class Rules> void cut_finder<Rules>::make_items(const goal & g) {
    const size_t n = picked.size();
    picked_logits.resize(n);
    for (size_t i = 0; i < n; i++) {
        picked_logits[i] = c.logits()[picked[i]];
    }
    std::fill(std::begin(block), std::end(block), 1.0);
    items.clear();
    for (size_t i = 0; i < n; i += block_size) {
        const size_t in = std::min<size_t>(block_size, n - i);
        if (!g.count) {
            k.weights(picked_logits.data() + i, int(in), c.weight_scale(), block);
        }
        for (size_t j = 0; j < in; j++) {
            const float logit = picked_logits[i + j];
            items.push_back({ std::fabs(x_of(logit) - g.center), block[j], logit, picked[i + j] });
        }
    }
}

template <class Rules> double cut_finder<Rules>::mean_of_x() {
    const scale s      = c.weight_scale();
    double      sum    = 0;
    double      moment = 0;
    for (int32_t i = 0; i < c.size(); i += block_size) {
        const float * l       = c.logits() + i;
        const int     n       = std::min(block_size, c.size() - i);
        double        lane[8] = {};
        sum += k.weights(l, n, s, block);
        for (int j = 0; j < n; j++) {
            lane[j % 8] += block[j] * x_of(l[j]);
        }
        moment += add_lanes(lane);
    }
    return moment / sum;
}

}  // namespace ggml_ext_sampling
