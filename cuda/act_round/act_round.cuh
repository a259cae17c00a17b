// GGML_EXT_OP_ACT_ROUND, device code: y = scale * clamp(rint(x / scale)) per group of a row.

#pragma once

#include "common/device.cuh"

// Rows of n values, adjacent, at byte strides nb1..nb3 of x; y without gaps.
struct ggml_ext_act_round_shape {
    int64_t  n, n_rows, group;
    uint32_t ne1, ne2;
    int64_t  nb1, nb2, nb3;
    float    q_max;
};

// Threads per group: a warp where groups are small, so that a block takes several of them.
constexpr int GGML_EXT_ACT_ROUND_THREADS = 256;

inline int ggml_ext_act_round_lanes(int64_t group) {
    return group <= 1024 ? 32 : GGML_EXT_ACT_ROUND_THREADS;
}

inline int64_t ggml_ext_act_round_blocks(const ggml_ext_act_round_shape & s) {
    const int64_t n_groups  = (s.n + s.group - 1) / s.group * s.n_rows;
    const int64_t per_block = GGML_EXT_ACT_ROUND_THREADS / ggml_ext_act_round_lanes(s.group);
    return (n_groups + per_block - 1) / per_block;
}

// LANES threads, 32 or all of the block, take one group. Division is IEEE's, so that ties fall as on the CPU.
template <int LANES>
static __global__ void __launch_bounds__(GGML_EXT_ACT_ROUND_THREADS) ggml_ext_act_round_kernel(
    const char * x, float * y, ggml_ext_act_round_shape s) {
    __shared__ float maxima[GGML_EXT_ACT_ROUND_THREADS / 32];
    const int64_t    per_row = (s.n + s.group - 1) / s.group;
    const int64_t    index   = int64_t(blockIdx.x) * (GGML_EXT_ACT_ROUND_THREADS / LANES) + threadIdx.x / LANES;
    const int64_t    row     = index / per_row;
    const bool       inside  = row < s.n_rows;
    const int64_t    first   = index % per_row * s.group;
    const int64_t    length  = !inside ? 0 : s.n - first < s.group ? s.n - first : s.group;
    const int64_t    i23 = row / s.ne1, i3 = i23 / s.ne2;
    const float *    from =
        reinterpret_cast<const float *>(x + (row - i23 * s.ne1) * s.nb1 + (i23 - i3 * s.ne2) * s.nb2 + i3 * s.nb3) +
        first;
    float * to = y + row * s.n + first;

    float max = 0.0f;  // fmaxf leaves NaN out
    for (int64_t i = threadIdx.x % LANES; i < length; i += LANES) {
        max = fmaxf(max, fabsf(from[i]));
    }
    max = ggml_ext::warp_max<32>(max);
    if constexpr (LANES > 32) {
        if (threadIdx.x % 32 == 0) {
            maxima[threadIdx.x / 32] = max;
        }
        __syncthreads();
        max = ggml_ext::warp_max<32>(maxima[threadIdx.x % (GGML_EXT_ACT_ROUND_THREADS / 32)]);
    } else {
        (void) maxima;
    }
    const float scale = __fdiv_rn(max, s.q_max);
    for (int64_t i = threadIdx.x % LANES; i < length; i += LANES) {
        float q = rintf(__fdiv_rn(from[i], scale));
        q       = q < -s.q_max ? -s.q_max : q > s.q_max ? s.q_max : q;
        // No scale: zeros, and numbers too small for one; NaN stays.
        to[i]   = scale > 0.0f ? q * scale : 0.0f * from[i];
    }
}
