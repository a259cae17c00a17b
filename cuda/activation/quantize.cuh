// Activations as int8, device code. activation.cuh has the layout.
//
// One warp takes one group of 256 values, 8 per lane. Consecutive warps take the same group of consecutive rows, so
// their scales share sectors.

#pragma once

#include "common/device.cuh"
#include "common/numerics.h"

constexpr int GGML_EXT_ACTIVATION_GROUP   = 256;
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

inline ggml_ext_activation_launch ggml_ext_activation_plan(const ggml_ext_activation_shape & shape, const void * x) {
    const int64_t n_groups = shape.k / GGML_EXT_ACTIVATION_GROUP * shape.n_rows;
    const int64_t n_warps  = GGML_EXT_ACTIVATION_THREADS / 32;
    const int64_t bits     = int64_t(reinterpret_cast<uintptr_t>(x)) | shape.nb1 | shape.nb2 | shape.nb3;
    return { unsigned((n_groups + n_warps - 1) / n_warps), bits % 16 == 0 };
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

template <bool ALIGNED>
static __global__ void __launch_bounds__(GGML_EXT_ACTIVATION_THREADS) ggml_ext_activation_kernel(
    const char * x, int8_t * codes, float * scales, ggml_ext_activation_shape shape) {
    ggml_ext::grid_dependency_launch();
    ggml_ext::grid_dependency_wait();
    const uint32_t n_rows = uint32_t(shape.n_rows);
    const uint32_t warp   = blockIdx.x * (GGML_EXT_ACTIVATION_THREADS / 32) + threadIdx.x / 32;
    const uint32_t lane   = threadIdx.x % 32;
    const uint32_t group  = warp / n_rows;
    const uint32_t row    = warp - group * n_rows;
    if (group >= uint32_t(shape.k / GGML_EXT_ACTIVATION_GROUP)) {
        return;
    }
    const uint32_t i23     = row / shape.ne1;
    const uint32_t i3      = i23 / shape.ne2;
    const int64_t  offset  = (row - i23 * shape.ne1) * shape.nb1 + (i23 - i3 * shape.ne2) * shape.nb2 + i3 * shape.nb3;
    const float *  values  = reinterpret_cast<const float *>(x + offset) + group * GGML_EXT_ACTIVATION_GROUP;
    // Values 4 l .. and 128 + 4 l ..: each load and each store is of adjacent lanes.
    const float4   v[2]    = { ggml_ext_activation_load<ALIGNED>(values + 4 * lane),
                               ggml_ext_activation_load<ALIGNED>(values + 128 + 4 * lane) };
    uint32_t       largest = 0;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint32_t xy = max(ggml_ext::magnitude_bits(v[i].x), ggml_ext::magnitude_bits(v[i].y));
        const uint32_t zw = max(ggml_ext::magnitude_bits(v[i].z), ggml_ext::magnitude_bits(v[i].w));
        largest           = max(largest, max(xy, zw));
    }
    const ggml_ext::activation_scale s = ggml_ext::activation_scale_of(ggml_ext::warp_max(largest));
    uint32_t * c = reinterpret_cast<uint32_t *>(codes + row * shape.k + group * GGML_EXT_ACTIVATION_GROUP);
    c[lane]      = ggml_ext::activation_codes(v[0], s.inverse);
    c[32 + lane] = ggml_ext::activation_codes(v[1], s.inverse);
    if (lane == 0) {
        scales[group * shape.n_rows + row] = s.scale;
    }
}
