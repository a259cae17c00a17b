// What both attention kernels do to a logit. Logits are in units of log2, as weights are exp2 of them.

#pragma once

#include "common/device.cuh"
#include "common/numerics.h"

namespace ggml_ext {

// ALiBi (arXiv 2108.12409, section 3) as in ggml: the slope of a head, 1 without.
__device__ __forceinline__ float attention_slope(float max_bias, int n_heads, int head) {
    if (max_bias <= 0.0f) {
        return 1.0f;
    }
    const int   power = 1 << (31 - __clz(n_heads));
    const float base  = -max_bias / float(power);
    return exp2_approx(head < power ? base * float(head + 1) : 0.5f * base * float(2 * (head - power) + 1));
}

// cap tanh(x) = cap (1 - 2 / (1 + exp(2 x))).
__device__ __forceinline__ float attention_softcap(float cap, float x) {
    return cap * log2_e * (1.0f - __fdividef(2.0f, 1.0f + exp2_approx(2.0f * log2_e * x)));
}

}  // namespace ggml_ext
