// GGML_EXT_OP_KRON on CUDA, any shape, in F32: the two products, the Hadamard transform and the clip one after the other.

#pragma once

#include "common/device.cuh"
#include "plan.h"

// c[p][q] = sum over k < depth of a(p, k) b(k, q), ascending in k, for p < rows, q < columns, for each token:
//   a(p, k) = a[p * a_row + k * a_depth] of the token (a_token 0: shared), b(k, q) = b[k * columns + q] likewise,
//   c[p]    = c + p * columns, tokens adjacent.
// Steps in elements; a token of the one that is x lies at the byte strides of `shape`.
struct ggml_ext_kron_product {
    int64_t rows, columns, depth, n_tokens;
    int64_t a_row, a_depth, a_token, b_token;
    bool    a_is_x, b_is_x;
};

constexpr int GGML_EXT_KRON_TILE  = 64;   // of c, per block
constexpr int GGML_EXT_KRON_DEPTH = 16;   // of a and b, in shared memory
constexpr int GGML_EXT_KRON_FLAT  = 256;  // threads per block of every kernel here

inline int64_t ggml_ext_kron_product_blocks(const ggml_ext_kron_product & p) {
    const int64_t tile = GGML_EXT_KRON_TILE;
    return (p.rows + tile - 1) / tile * ((p.columns + tile - 1) / tile) * p.n_tokens;
}

// Z = left^T X.
inline ggml_ext_kron_product ggml_ext_kron_left_product(const ggml_ext_kron_shape & s) {
    return { s.n1, s.n2, s.n1, s.n_tokens, 1, s.n1, 0, 0, false, true };
}

// Y = Z right, Z being x itself or a result. Rows that lie without gaps are one matrix, whatever their token.
inline ggml_ext_kron_product ggml_ext_kron_right_product(const ggml_ext_kron_shape & s, bool a_is_x) {
    const int64_t         n = int64_t(s.n1) * s.n2;
    ggml_ext_kron_product p = { s.n1, s.n2, s.n2, s.n_tokens, s.n2, 1, n, 0, a_is_x, false };
    if (!a_is_x || (s.nb1 == n * 4 && s.nb2 == s.nb1 * s.ne1 && s.nb3 == s.nb2 * s.ne2)) {
        p.rows *= p.n_tokens;
        p.n_tokens = 1;
    }
    return p;
}

// The shape that reads y in the place of x.
inline ggml_ext_kron_shape ggml_ext_kron_result_shape(ggml_ext_kron_shape s) {
    s.ne1 = uint32_t(s.n_tokens);
    s.ne2 = 1;
    s.nb1 = int64_t(s.n1) * s.n2 * 4;
    s.nb2 = s.nb3 = s.nb1 * s.n_tokens;
    return s;
}

namespace ggml_ext {

__device__ __forceinline__ int64_t kron_token_offset(const ggml_ext_kron_shape & s, int64_t token) {
    const int64_t i23 = token / s.ne1, i3 = i23 / s.ne2;
    return (token - i23 * s.ne1) * s.nb1 + (i23 - i3 * s.ne2) * s.nb2 + i3 * s.nb3;
}

__device__ __forceinline__ float kron_to_float(float v) {
    return v;
}
__device__ __forceinline__ float kron_to_float(half v) {
    return __half2float(v);
}

}  // namespace ggml_ext

// A thread has 4 x 4 elements of c: rows ty + 16 i, columns tx + 16 j.
template <typename A, typename B>
static __global__ void __launch_bounds__(GGML_EXT_KRON_FLAT) ggml_ext_kron_product_kernel(const A * a, const B * b,
                                                                                          float *               c,
                                                                                          ggml_ext_kron_product p,
                                                                                          ggml_ext_kron_shape   s) {
    constexpr int    TILE = GGML_EXT_KRON_TILE, DEPTH = GGML_EXT_KRON_DEPTH;
    __shared__ float a_tile[DEPTH][TILE + 1], b_tile[DEPTH][TILE];
    const int64_t    across = (p.columns + TILE - 1) / TILE, down = (p.rows + TILE - 1) / TILE;
    const int64_t    token = blockIdx.x / (across * down), tile = blockIdx.x % (across * down);
    const int64_t    row0 = tile / across * TILE, column0 = tile % across * TILE;
    const int        tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    a += p.a_is_x ? ggml_ext::kron_token_offset(s, token) / int64_t(sizeof(A)) : token * p.a_token;
    b += p.b_is_x ? ggml_ext::kron_token_offset(s, token) / int64_t(sizeof(B)) : token * p.b_token;

    float sum[4][4] = {};
    for (int64_t k0 = 0; k0 < p.depth; k0 += DEPTH) {
        for (int i = threadIdx.x; i < TILE * DEPTH; i += GGML_EXT_KRON_FLAT) {
            // Adjacent threads read adjacent elements: a is read along whichever of its steps is 1.
            const int     ar = p.a_depth == 1 ? i / DEPTH : i % TILE, ak = p.a_depth == 1 ? i % DEPTH : i / TILE;
            const int64_t row = row0 + ar, k = k0 + ak;
            a_tile[ak][ar] =
                row < p.rows && k < p.depth ? ggml_ext::kron_to_float(a[row * p.a_row + k * p.a_depth]) : 0.0f;
            const int64_t bk = k0 + i / TILE, column = column0 + i % TILE;
            b_tile[i / TILE][i % TILE] =
                bk < p.depth && column < p.columns ? ggml_ext::kron_to_float(b[bk * p.columns + column]) : 0.0f;
        }
        __syncthreads();
        // No further than the depth: zeros of the padding times Inf would be NaN.
        const int n_k = p.depth - k0 < DEPTH ? int(p.depth - k0) : DEPTH;
        for (int k = 0; k < n_k; k++) {
            float av[4], bv[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                av[i] = a_tile[k][ty + 16 * i];
                bv[i] = b_tile[k][tx + 16 * i];
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    sum[i][j] = __fmaf_rn(av[i], bv[j], sum[i][j]);
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int64_t row = row0 + ty + 16 * i, column = column0 + tx + 16 * j;
            if (row < p.rows && column < p.columns) {
                c[(token * p.rows + row) * p.columns + column] = sum[i][j];
            }
        }
    }
}

// Values per block of the next kernel: whole pieces, which `order` divides.
inline int ggml_ext_kron_chunk(int order) {
    return order > 2048 ? order : 2048;
}
constexpr int GGML_EXT_KRON_MAX_HADAMARD = 8192;  // order; a piece lies in 32 KiB of shared memory

// Each piece of `order` values, a power of two, times the normalised Walsh-Hadamard matrix, from x to y; order 1: a copy.
// Dynamic shared memory: ggml_ext_kron_chunk(order) floats. x == y is allowed.
static __global__ void __launch_bounds__(GGML_EXT_KRON_FLAT) ggml_ext_kron_hadamard_kernel(const char * x, float * y,
                                                                                           int order, int64_t n,
                                                                                           ggml_ext_kron_shape s) {
    GGML_EXT_DYNAMIC_SHARED(float, v);
    const int     chunk   = order > 2048 ? order : 2048;
    const int64_t n_parts = (n + chunk - 1) / chunk, token = blockIdx.x / n_parts;
    const int64_t first  = blockIdx.x % n_parts * chunk;
    const int     length = n - first < chunk ? int(n - first) : chunk;
    const float * from   = reinterpret_cast<const float *>(x + ggml_ext::kron_token_offset(s, token)) + first;
    float *       to     = y + token * n + first;
    for (int i = threadIdx.x; i < length; i += GGML_EXT_KRON_FLAT) {
        v[i] = from[i];
    }
    __syncthreads();
    for (int half = 1; half < order; half *= 2) {
        for (int i = threadIdx.x; i < length / 2; i += GGML_EXT_KRON_FLAT) {
            const int   low = (i & ~(half - 1)) * 2 + (i & (half - 1));
            const float p = v[low], q = v[low + half];
            v[low]        = p + q;
            v[low + half] = p - q;
        }
        __syncthreads();
    }
    const float scale = order > 1 ? 1.0f / sqrtf(float(order)) : 1.0f;
    for (int i = threadIdx.x; i < length; i += GGML_EXT_KRON_FLAT) {
        to[i] = scale * v[i];
    }
}

// Each row of n values clamped to +-clip times its largest magnitude, in place. One block per row; a NaN stays and counts
// for no maximum.
static __global__ void __launch_bounds__(GGML_EXT_KRON_FLAT) ggml_ext_kron_clip_kernel(float * y, int64_t n,
                                                                                       float clip) {
    __shared__ float maxima[GGML_EXT_KRON_FLAT / 32];
    float *          row = y + blockIdx.x * n;
    float            max = 0.0f;
    for (int64_t i = threadIdx.x; i < n; i += GGML_EXT_KRON_FLAT) {
        max = fmaxf(max, fabsf(row[i]));
    }
    max = ggml_ext::warp_max<32>(max);
    if (threadIdx.x % 32 == 0) {
        maxima[threadIdx.x / 32] = max;
    }
    __syncthreads();
    max               = ggml_ext::warp_max<32>(maxima[threadIdx.x % (GGML_EXT_KRON_FLAT / 32)]);
    const float limit = clip * max;
    for (int64_t i = threadIdx.x; i < n; i += GGML_EXT_KRON_FLAT) {
        const float v = row[i];
        row[i]        = v < -limit ? -limit : v > limit ? limit : v;
    }
}
