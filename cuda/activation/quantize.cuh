// Activations as int8, device code. activation.cuh has the layout.
//
// A warp takes a group of 256 values, 8 per lane, or two of 64, 4 per lane. Consecutive ones take the same group of
// consecutive rows, so their scales share sectors.

#pragma once

#include "common/device.cuh"
#include "common/numerics.h"

constexpr int GGML_EXT_ACTIVATION_GROUP   = 256;  // FQ4's, and of what other kernels write
constexpr int GGML_EXT_ACTIVATION_THREADS = 256;

// x: rows of k values, adjacent, at byte strides nb1..nb3.
struct ggml_ext_activation_shape {
    int64_t  k, n_rows;
    uint32_t ne1, ne2;
    int64_t  nb1, nb2, nb3;
};

// What the launch needs beside the pointers.
struct ggml_ext_activation_launch {
    unsigned n_blocks;
    bool     aligned;  // all rows of x start at multiples of 16 bytes
};

// Threads that share a group.
constexpr int ggml_ext_activation_team(int group) {
    return group < 128 ? group / 4 : 32;
}

// The same as a constant of device code.
template <int GROUP> struct ggml_ext_activation_shares {
    static constexpr int team = ggml_ext_activation_team(GROUP);
};

inline ggml_ext_activation_launch ggml_ext_activation_plan(const ggml_ext_activation_shape & shape, int group,
                                                           const void * x) {
    const int64_t n_groups = shape.k / group * shape.n_rows;
    const int64_t n_teams  = GGML_EXT_ACTIVATION_THREADS / ggml_ext_activation_team(group);
    const int64_t bits     = int64_t(reinterpret_cast<uintptr_t>(x)) | shape.nb1 | shape.nb2 | shape.nb3;
    return { unsigned((n_groups + n_teams - 1) / n_teams), bits % 16 == 0 };
}

namespace ggml_ext {

// The largest magnitude of a group, as the bits of a float: those order like the magnitudes, and NaN and Inf come last.
__device__ __forceinline__ uint32_t magnitude_bits(float x) {
    return __float_as_uint(x) & 0x7fffffff;
}

struct activation_scale {
    float scale, inverse;
};

// Of a group by the bits of its largest magnitude. Below 2^-119 a scale would be denormal: such a group counts as zeros.
__device__ __forceinline__ activation_scale activation_scale_of(uint32_t max_bits) {
    const float max = __uint_as_float(max_bits);
    if (max_bits >= 0x7f800000) {
        return { __uint_as_float(0x7fc00000), 0.0f };
    }
    if (max < 0x1p-119f) {
        return { 0.0f, 0.0f };
    }
    return { max * (1.0f / 127.0f), __fdiv_rn(127.0f, max) };
}

// rint(x * inverse), ties to even, in the low byte.
__device__ __forceinline__ uint32_t activation_code(float x, float inverse) {
    return __float_as_uint(__fmaf_rn(x, inverse, magic));
}

// The codes of four values, the first in the low byte.
__device__ __forceinline__ uint32_t activation_codes(float4 v, float inverse) {
    const uint32_t low  = __byte_perm(activation_code(v.x, inverse), activation_code(v.y, inverse), 0x0040);
    const uint32_t high = __byte_perm(activation_code(v.z, inverse), activation_code(v.w, inverse), 0x0040);
    return __byte_perm(low, high, 0x5410);
}

}  // namespace ggml_ext

template <bool ALIGNED> __device__ __forceinline__ float4 ggml_ext_activation_load(const float * x) {
    if constexpr (ALIGNED) {
        return *reinterpret_cast<const float4 *>(x);
    } else {
        return make_float4(x[0], x[1], x[2], x[3]);
    }
}

template <int GROUP, bool ALIGNED>
static __global__ void __launch_bounds__(GGML_EXT_ACTIVATION_THREADS) ggml_ext_activation_kernel(
    const char * x, int8_t * codes, float * scales, ggml_ext_activation_shape shape) {
    constexpr int TEAM = ggml_ext_activation_shares<GROUP>::team, VECTORS = GROUP / (4 * TEAM);
    ggml_ext::grid_dependency_launch();
    ggml_ext::grid_dependency_wait();
    const uint32_t n_rows = uint32_t(shape.n_rows);
    const uint32_t team   = blockIdx.x * (GGML_EXT_ACTIVATION_THREADS / TEAM) + threadIdx.x / TEAM;
    const uint32_t lane   = threadIdx.x % TEAM;
    const uint32_t group  = team / n_rows;
    const uint32_t row    = team - group * n_rows;
    const bool     exists = group < uint32_t(shape.k / GROUP);  // else the team only takes part in the warp's maximum
    const uint32_t i23    = row / shape.ne1;
    const uint32_t i3     = i23 / shape.ne2;
    const int64_t  offset = (row - i23 * shape.ne1) * shape.nb1 + (i23 - i3 * shape.ne2) * shape.nb2 + i3 * shape.nb3;
    const float *  values = reinterpret_cast<const float *>(x + offset) + group * GROUP;
    // Values 4 l .. and 128 + 4 l ..: each load and each store is of adjacent lanes.
    float4         v[VECTORS];
    uint32_t       largest = 0;
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        v[i] = exists ? ggml_ext_activation_load<ALIGNED>(values + 128 * i + 4 * lane) : make_float4(0, 0, 0, 0);
        const uint32_t xy = max(ggml_ext::magnitude_bits(v[i].x), ggml_ext::magnitude_bits(v[i].y));
        const uint32_t zw = max(ggml_ext::magnitude_bits(v[i].z), ggml_ext::magnitude_bits(v[i].w));
        largest           = max(largest, max(xy, zw));
    }
    const ggml_ext::activation_scale s = ggml_ext::activation_scale_of(ggml_ext::warp_max<TEAM>(largest));
    if (!exists) {
        return;
    }
    uint32_t * c = reinterpret_cast<uint32_t *>(codes + row * shape.k + group * GROUP);
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        c[32 * i + lane] = ggml_ext::activation_codes(v[i], s.inverse);
    }
    if (lane == 0) {
        scales[group * shape.n_rows + row] = s.scale;
    }
}

// The kernel for groups of 256 or 64.
inline auto ggml_ext_activation_kernel_of(int group, bool aligned) {
    if (group == GGML_EXT_ACTIVATION_GROUP) {
        return aligned ? ggml_ext_activation_kernel<GGML_EXT_ACTIVATION_GROUP, true> :
                         ggml_ext_activation_kernel<GGML_EXT_ACTIVATION_GROUP, false>;
    }
    return aligned ? ggml_ext_activation_kernel<64, true> : ggml_ext_activation_kernel<64, false>;
}
