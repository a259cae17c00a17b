// The inner loops of the fused sampler, one table per instruction set. Every table gives the same bits: sums have
// eight lanes (element i adds to lane i % 8) and one order of reduction, every multiply-add is a fused one, and
// the files are compiled without contraction (ggml_ext/cmake/inject.cmake).

#pragma once

#include <cstdint>

namespace ggml_ext_sampling {

// Elements per call at most. The sums of a draw and the largest values that let a pass skip are kept per block.
constexpr int block_size = 256;

// Slack in floats behind an output of `compact`, which stores whole vectors.
constexpr int compact_slack = 16;

// x(l) = (l - max) * inv_t, in double: at most 0, and the weight of a candidate is exp(x).
struct scale {
    double max;
    double inv_t;
};

// |x(l) - center| * per_key, cut to an integer and to n_buckets - 1.
struct bucketing {
    double center;
    double per_key;
    int    n_buckets;
};

struct kernels {
    const char * name;

    // Smallest and largest of n values; false if one is NaN, and then the two mean nothing.
    bool (*range)(const float * l, int n, float * min, float * max);

    // w[i] = exp(x(l[i])), below 1e-304 zero; returns the sum.
    double (*weights)(const float * l, int n, const scale & s, double * w);

    void (*buckets)(const float * l, int n, const scale & s, const bucketing & b, uint16_t * out);

    // The elements with l >= least, in order, and their ids: id[i], or first + i where id is null. The outputs may
    // overlap the inputs from the left, and are written up to compact_slack elements too far. Returns the count.
    int (*compact)(const float * l, const int32_t * id, int32_t first, int n, float least, float * out_l,
                   int32_t * out_id);

    // Reads the logits out of an array of llama_token_data, here as words: id, logit, p. False unless the ids are
    // first, first + 1, ..
    bool (*unpack)(const int32_t * data, int32_t first, int n, float * l);
};

const kernels & kernels_generic();

// Null where the compiler or the processor lacks them.
const kernels * kernels_avx2();
const kernels * kernels_avx512();

// The fastest that this processor has.
const kernels & kernels_best();

// The one order in which eight lanes are added.
inline double add_lanes(const double * lane) {
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

}  // namespace ggml_ext_sampling
