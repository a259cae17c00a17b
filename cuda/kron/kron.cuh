// GGML_EXT_OP_KRON on tensor cores, and the activations' int8 form in the same pass: Y = left^T X right per token.
//
// A block keeps the factors in shared memory and takes one token at a time:
//     X (global, F32) -> f16 [n1][n2] in shared memory
//     Z[a][j] = sum_i left[i][a] X[i][j]     A = left^T from fragments, B = X by transposing ldmatrix
//     Z over X in shared memory, f16
//     Y^T[b][a] = sum_j right[j][b] Z[a][j]  A = right^T from fragments, B = Z^T by plain ldmatrix
// X, Z and the factors are scaled by powers of two, exactly, so that f16 holds their range (fragments.cuh).
// Y stays in registers until the clip's and the groups' maxima are known.

#pragma once

#include "activation/quantize.cuh"
#include "common/device.cuh"
#include "fragments.cuh"
#include "plan.h"

struct ggml_ext_kron_args {
    ggml_ext_kron_shape  shape;
    ggml_ext_kron_factor left, right;
    bool                 factors_are_leaves;  // nothing that the stream has yet to finish writes the factors
    const char *         x;
    float *              y;                   // null: not wanted
    int8_t *             codes;  // null: not wanted; else n2 % 16 == 0 and n1 n2 % 256 == 0 (activation.cuh)
    float *              scales;
};

namespace ggml_ext {

// Vectors of a token that a thread keeps in registers between its two looks at them; it reads the others again. More would
// spill beside two units.
constexpr int KRON_KEPT = 8;

// Maximum over the block. Two sets of cells by turns: between two uses of a set lies a barrier.
struct kron_block_max {
    uint32_t * cells;
    int        turn = 0;

    __device__ __forceinline__ uint32_t operator()(uint32_t bits) {
        const int  lane = threadIdx.x % 32, n_warps = blockDim.x / 32;
        uint32_t * set = cells + GGML_EXT_KRON_MAX_WARPS * turn;
        turn ^= 1;
        bits = warp_max(bits);
        if (lane == 0) {
            set[threadIdx.x / 32] = bits;
        }
        __syncthreads();
        return warp_max(lane < n_warps ? set[lane] : 0);
    }
};

// A factor in shared memory: `lo` is null where it is exact in f16.
struct kron_operand {
    uint4 *    hi;
    uint4 *    lo;
    int        tiles;
    kron_scale scale;
};

// Fills o.hi and o.lo. Nearly all factors fit f16 as they are; the others are packed again, scaled.
__device__ __forceinline__ void kron_load_factor(kron_operand & o, const ggml_ext_kron_factor & f,
                                                 kron_block_max & block_max) {
    o.tiles                = (f.order + 15) / 16;
    o.scale                = { 1.0f, 1.0f };
    const uint32_t largest = block_max(kron_pack_factor(f, 1.0f, o.hi, o.lo));
    if (largest < __float_as_uint(0x1p-8f) || largest >= __float_as_uint(0x1p15f)) {
        o.scale = kron_scale_of(largest);
        kron_pack_factor(f, o.scale.up, o.hi, o.lo);
    }
}

// A warp's units of a product, `columns` wide: unit u is rows 16 (u % tiles).. and columns 8 NT (u / tiles)...
template <int NT, int UNITS> struct kron_tile {
    float acc[UNITS][NT][4];

    // This thread's number, for the address arithmetic of one phase.
    static __device__ __forceinline__ int thread() { return keep_out_of_registers(int(threadIdx.x)); }

    static __device__ __forceinline__ int unit(int thread, int u) { return thread / 32 + u * int(blockDim.x / 32); }

    // B[k][n]: TRANS: at b + k stride + n; else at b + n stride + k. Its lo plane follows `plane` elements later.
    template <int TERMS, bool TRANS>
    __device__ __forceinline__ void product(const kron_operand & a, int columns, const half * b, int stride,
                                            int plane) {
        const int self = thread(), lane = self % 32;
        // Of this lane's row in the four matrices of an ldmatrix, k by n: 0-7 0-7, 8-15 0-7, 0-7 8-15, 8-15 8-15.
        const int k_lane = TRANS ? lane % 16 : lane / 8 % 2 * 8;
        const int n_lane = TRANS ? lane / 16 * 8 : lane / 16 * 8 + lane % 8;
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
            const int n0 = unit(self, u) / a.tiles * (8 * NT), m = unit(self, u) % a.tiles;
#pragma unroll
            for (int i = 0; i < NT; i++) {
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    acc[u][i][r] = 0.0f;
                }
            }
            if (n0 >= columns) {
                continue;
            }
#pragma unroll 1
            for (int k = 0; k < a.tiles; k++) {
                const int      at      = (k * a.tiles + m) * 32 + lane;
                const uint4    h       = a.hi[at];
                const uint32_t a_hi[4] = { h.x, h.y, h.z, h.w };
                const uint4    l       = TERMS > 1 && a.lo ? a.lo[at] : make_uint4(0, 0, 0, 0);
                const uint32_t a_lo[4] = { l.x, l.y, l.z, l.w };
                const half *   row =
                    TRANS ? b + (16 * k + k_lane) * stride + n0 + n_lane : b + (n0 + n_lane) * stride + 16 * k + k_lane;
#pragma unroll
                for (int i = 0; i < NT; i += 2, row += TRANS ? 16 : 16 * stride) {
                    if (n0 + 8 * i < columns) {
                        pair<TERMS, TRANS>(acc[u][i], acc[u][i + 1], a_hi, a_lo, a.lo != nullptr, row, plane);
                    }
                }
            }
        }
    }

    template <int TERMS, bool TRANS>
    static __device__ __forceinline__ void pair(float (&d0)[4], float (&d1)[4], const uint32_t (&a_hi)[4],
                                                const uint32_t (&a_lo)[4], bool has_lo, const half * row, int plane) {
        uint32_t b[4];
        load<TRANS>(b, row);
        const uint32_t b0[2] = { b[0], b[1] }, b1[2] = { b[2], b[3] };
        if constexpr (TERMS > 1) {
            load<TRANS>(b, row + plane);
            const uint32_t lo0[2] = { b[0], b[1] }, lo1[2] = { b[2], b[3] };
            mma_f16(d0, a_hi, lo0);
            mma_f16(d1, a_hi, lo1);
            if (has_lo) {
                mma_f16(d0, a_lo, b0);
                mma_f16(d1, a_lo, b1);
            }
        }
        mma_f16(d0, a_hi, b0);
        mma_f16(d1, a_hi, b1);
    }

    template <bool TRANS> static __device__ __forceinline__ void load(uint32_t (&b)[4], const half * row) {
        if constexpr (TRANS) {
            ldmatrix_x4_trans(b, row);
        } else {
            ldmatrix_x4(b, row);
        }
    }

    // f(i, j, value) for the elements inside rows x columns; i and j are m step.x + n step.y of element (m, n) with the
    // steps i_step and j_step.
    template <typename F>
    __device__ __forceinline__ void each(int tiles, int rows, int columns, int2 i_step, int2 j_step, const F & f) {
        const int self = thread(), g = self % 32 / 4, t = self % 4;
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
            const int m = unit(self, u) % tiles * 16 + g, n = unit(self, u) / tiles * (8 * NT) + 2 * t;
            int       i0 = m * i_step.x + n * i_step.y, j0 = m * j_step.x + n * j_step.y;
#pragma unroll
            for (int k = 0; k < NT; k++, i0 += 8 * i_step.y, j0 += 8 * j_step.y) {
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    if (r / 2 * 8 < rows - m && 8 * k + r % 2 < columns - n) {
                        f(i0 + r / 2 * 8 * i_step.x + r % 2 * i_step.y, j0 + r / 2 * 8 * j_step.x + r % 2 * j_step.y,
                          acc[u][k][r]);
                    }
                }
            }
        }
    }
};

// X or Z in shared memory.
struct kron_matrix {
    half * values;
    int    stride, plane;  // elements

    template <int TERMS> __device__ __forceinline__ void set(int index, float v) const {
        half * to = values + index;
        *to       = __float2half_rn(v);
        if constexpr (TERMS > 1) {
            to[plane] = __float2half_rn(v - __half2float(*to));
        }
    }

    template <int TERMS> __device__ __forceinline__ void set4(int row, int column, float4 v) const {
        uint2  hi, lo;
        half * to = values + row * stride + column;
        kron_split(v.x, v.y, hi.x, lo.x);
        kron_split(v.z, v.w, hi.y, lo.y);
        *reinterpret_cast<uint2 *>(to) = hi;
        if constexpr (TERMS > 1) {
            *reinterpret_cast<uint2 *>(to + plane) = lo;
        }
    }
};

__device__ __forceinline__ uint32_t kron_finite_bits(float4 v) {
    return max(max(kron_finite_bits(v.x), kron_finite_bits(v.y)), max(kron_finite_bits(v.z), kron_finite_bits(v.w)));
}

// One token to shared memory, scaled; returns the scale.
template <int TERMS>
__device__ __forceinline__ kron_scale kron_load_token(const float4 * x, int n2, int n_vectors, const kron_matrix & to,
                                                      kron_block_max & block_max) {
    const int      first = keep_out_of_registers(int(threadIdx.x)), step = blockDim.x;
    const unsigned inverse = 0xffffffffu / unsigned(n2) + 1;  // __umulhi by it divides by n2 >= 4, up to 2^32 / n2
    float4         kept[KRON_KEPT];
    uint32_t       largest = 0;
#pragma unroll
    for (int i = 0; i < KRON_KEPT; i++) {
        const int v = first + i * step;
        kept[i]     = v < n_vectors ? x[v] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
#pragma unroll
    for (int i = 0; i < KRON_KEPT; i++) {
        largest = max(largest, kron_finite_bits(kept[i]));
    }
    for (int v = first + KRON_KEPT * step; v < n_vectors; v += step) {
        largest = max(largest, kron_finite_bits(x[v]));
    }
    const kron_scale scale = kron_scale_of(block_max(largest));
    const auto       store = [&](int v, float4 f) {
        const int row = int(__umulhi(unsigned(4 * v), inverse));
        to.set4<TERMS>(row, 4 * v - row * n2,
                             make_float4(scale.up * f.x, scale.up * f.y, scale.up * f.z, scale.up * f.w));
    };
#pragma unroll
    for (int i = 0; i < KRON_KEPT; i++) {
        if (first + i * step < n_vectors) {
            store(first + i * step, kept[i]);
        }
    }
    for (int v = first + KRON_KEPT * step; v < n_vectors; v += step) {
        store(v, x[v]);
    }
    return scale;
}

}  // namespace ggml_ext

#include "output.cuh"

// TERMS of f16 (fragments.cuh); NT and UNITS as in ggml_ext_kron_plan.
template <int TERMS, int NT, int UNITS>
static __global__ void __launch_bounds__(32 * GGML_EXT_KRON_MAX_WARPS, 1) ggml_ext_kron_kernel(
    ggml_ext_kron_args args) {
    using namespace ggml_ext;
    GGML_EXT_DYNAMIC_SHARED(char, shared);
    const ggml_ext_kron_shape & s = args.shape;
    const ggml_ext_kron_layout  l = ggml_ext_kron_layout_of(s.n1, s.n2, args.left.kind, args.right.kind, TERMS);
    const bool        left = args.left.kind != GGML_EXT_KRON_NONE, right = args.right.kind != GGML_EXT_KRON_NONE;
    const kron_matrix x         = { reinterpret_cast<half *>(shared + l.x), l.stride, int(l.x_plane / 2) };
    kron_block_max    block_max = { reinterpret_cast<uint32_t *>(shared + l.cells) };

    grid_dependency_launch();
    if (!args.factors_are_leaves) {
        grid_dependency_wait();
    }
    const auto operand = [&](size_t offset, const ggml_ext_kron_factor & f) {
        uint4 *   hi    = reinterpret_cast<uint4 *>(shared + offset);
        const int tiles = (f.order + 15) / 16;
        return kron_operand{
            hi, TERMS > 1 && f.kind == GGML_EXT_KRON_F32 ? hi + tiles * tiles * 32 : nullptr, tiles, {}
        };
    };
    kron_operand a_left = operand(0, args.left), a_right = operand(l.right, args.right);
    if (left) {
        kron_load_factor(a_left, args.left, block_max);
    }
    if (right) {
        kron_load_factor(a_right, args.right, block_max);
    }
    // The padding of X stays zero from here on: later writes go to the rows and columns inside.
    for (size_t i = threadIdx.x; i < (TERMS > 1 ? 2 : 1) * l.x_plane / 16; i += blockDim.x) {
        reinterpret_cast<uint4 *>(x.values)[i] = make_uint4(0, 0, 0, 0);
    }
    if (args.factors_are_leaves) {
        grid_dependency_wait();
    }

    kron_output<NT, UNITS> out = { args, l, reinterpret_cast<uint32_t *>(shared + l.groups), x, block_max };
    for (int64_t token = blockIdx.x; token < s.n_tokens; token += gridDim.x) {
        const uint32_t i23 = uint32_t(token) / s.ne1, i3 = i23 / s.ne2;
        const char *   row = args.x + (uint32_t(token) - i23 * s.ne1) * s.nb1 + (i23 - i3 * s.ne2) * s.nb2 + i3 * s.nb3;
        const kron_scale x_scale =
            kron_load_token<TERMS>(reinterpret_cast<const float4 *>(row), s.n2, s.n1 * s.n2 / 4, x, out.block_max);
        __syncthreads();
        kron_tile<NT, UNITS> tile;
        float                down = x_scale.down;
        if (left) {
            tile.template product<TERMS, true>(a_left, l.columns, x.values, l.stride, x.plane);
            down = x_scale.down * a_left.scale.down;
        }
        if (left && right) {
            uint32_t largest = 0;
            tile.each(a_left.tiles, s.n1, s.n2, {}, {},
                      [&](int, int, float z) { largest = max(largest, kron_finite_bits(z)); });
            const kron_scale z_scale = kron_scale_of(out.block_max(largest));
            tile.each(a_left.tiles, s.n1, s.n2, { l.stride, 1 }, {},
                      [&](int i, int, float z) { x.set<TERMS>(i, z_scale.up * z); });
            __syncthreads();
            down = x_scale.down * a_left.scale.down * z_scale.down;
        }
        if (right) {
            tile.template product<TERMS, false>(a_right, l.rows, x.values, l.stride, x.plane);
            out.template finish<true>(tile, a_right.tiles, down * a_right.scale.down, token);
        } else {
            out.template finish<false>(tile, a_left.tiles, down, token);
        }
    }
}
