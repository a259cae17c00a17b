// Attention in parts: a cache that is cut into chunks gives, of each row, a maximum of logits, a sum of weights, and
// sums of weights times V (flash-decoding). Parts are added in ascending order, which the shape alone gives.

#pragma once

#include "common/device.cuh"

namespace ggml_ext {

// What a part with the maximum `top` is to be multiplied with where `max` is that of all parts. If all are -inf, the
// parts are zeros, or NaN, which must show.
__device__ __forceinline__ float attention_part_weight(float top, float max) {
    return max == -INFINITY ? 1.0f : exp2_approx(top - max);
}

// total and sum: of parts first, first + step, ... below n. part(i): maximum and sum of weights; values(i): four channels.
template <typename P, typename V>
__device__ __forceinline__ void attention_add_parts(float & total, float4 & sum, int first, int step, int n, float max,
                                                    const P & part, const V & values) {
#pragma unroll 4
    for (int i = first; i < n; i += step) {
        const float2 meta   = part(i);
        const float4 x      = values(i);
        const float  weight = attention_part_weight(meta.x, max);
        total               = fmaf(weight, meta.y, total);
        sum.x               = fmaf(weight, x.x, sum.x);
        sum.y               = fmaf(weight, x.y, sum.y);
        sum.z               = fmaf(weight, x.z, sum.z);
        sum.w               = fmaf(weight, x.w, sum.w);
    }
}

}  // namespace ggml_ext
