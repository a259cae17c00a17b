// GGML_EXT_OP_KRON on CUDA: matrices as sums of f16, and a factor as fragments of mma's A.
//
// A value v of a matrix whose largest magnitude is scaled to [2^14, 2^15) is hi + lo, hi = f16(v), lo = f16(v - hi): 22
// bits. One term drops lo (11 bits); three terms are hi hi + hi lo + lo hi.

#pragma once

#include "common/device.cuh"
#include "plan.h"

namespace ggml_ext {

// A power of two that brings a magnitude into [2^14, 2^15), and its inverse. Those below 2^-100 are only brought near.
struct kron_scale {
    float up, down;
};

__device__ __forceinline__ kron_scale kron_scale_of(uint32_t max_bits) {
    const int shift = 14 - max(int(max_bits >> 23) - 127, -100);
    return { __uint_as_float(uint32_t(127 + shift) << 23), __uint_as_float(uint32_t(127 - shift) << 23) };
}

// Bits of |v|, 0 for NaN and Inf: those take no part in a scale.
__device__ __forceinline__ uint32_t kron_finite_bits(float v) {
    const uint32_t bits = __float_as_uint(v) & 0x7fffffff;
    return bits < 0x7f800000 ? bits : 0;
}

__device__ __forceinline__ uint32_t kron_pack(half x, half y) {
    const half2 v = __halves2half2(x, y);
    uint32_t    bits;
    memcpy(&bits, &v, sizeof(bits));
    return bits;
}

// Two values as their hi and lo parts.
__device__ __forceinline__ void kron_split(float x, float y, uint32_t & hi, uint32_t & lo) {
    const half hx = __float2half_rn(x), hy = __float2half_rn(y);
    hi = kron_pack(hx, hy);
    lo = kron_pack(__float2half_rn(x - __half2float(hx)), __float2half_rn(y - __half2float(hy)));
}

__device__ __forceinline__ float kron_element(const ggml_ext_kron_factor & f, int i, int a) {
    if (i >= f.order || a >= f.order) {
        return 0.0f;
    }
    switch (f.kind) {
        case GGML_EXT_KRON_F32:
            return static_cast<const float *>(f.data)[i * f.order + a];
        case GGML_EXT_KRON_F16:
            return __half2float(static_cast<const half *>(f.data)[i * f.order + a]);
        default:
            return __popc(unsigned(i & a)) % 2 ? -1.0f : 1.0f;
    }
}

// The factor's transpose as A: fragment (mt, kt), at kt * tiles + mt, holds A[m][k] = factor[k][m] of m in 16 mt.., k in
// 16 kt... Where `lo` is not null it gets the rest. Returns the largest finite magnitude that this thread met, as bits.
__device__ __forceinline__ uint32_t kron_pack_factor(const ggml_ext_kron_factor & f, float scale, uint4 * hi,
                                                     uint4 * lo) {
    const int tiles = (f.order + 15) / 16;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    uint32_t  largest = 0;
#pragma unroll 2
    for (int i = threadIdx.x / 32; i < tiles * tiles; i += blockDim.x / 32) {
        const int m = i % tiles * 16 + g, k = i / tiles * 16 + 2 * t;
        uint32_t  h[4], rest[4];
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const int   mr = m + 8 * (r % 2), kr = k + 8 * (r / 2);
            const float x = kron_element(f, kr, mr), y = kron_element(f, kr + 1, mr);
            largest = max(largest, max(kron_finite_bits(x), kron_finite_bits(y)));
            kron_split(scale * x, scale * y, h[r], rest[r]);
        }
        hi[i * 32 + lane] = make_uint4(h[0], h[1], h[2], h[3]);
        if (lo) {
            lo[i * 32 + lane] = make_uint4(rest[0], rest[1], rest[2], rest[3]);
        }
    }
    return largest;
}

}  // namespace ggml_ext
