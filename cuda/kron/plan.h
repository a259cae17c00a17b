// GGML_EXT_OP_KRON on CUDA: what launcher and kernels agree on, and which kernel with how many threads runs a shape.

#pragma once

#include "common/occupancy.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>

enum ggml_ext_kron_kind : int32_t {
    GGML_EXT_KRON_NONE,
    GGML_EXT_KRON_F32,
    GGML_EXT_KRON_F16,
    GGML_EXT_KRON_HADAMARD,  // (-1)^popcount(i & j); the result is to be divided by sqrt(order)
};

// Square matrix in C order, element [i][a] at i order + a.
struct ggml_ext_kron_factor {
    const void *       data;
    int32_t            order;
    ggml_ext_kron_kind kind;
};

// Rows of x as X[n1][n2], adjacent values, at byte strides nb1..nb3; Y likewise, without gaps.
struct ggml_ext_kron_shape {
    int32_t  n1, n2;
    int64_t  n_tokens;
    uint32_t ne1, ne2;
    int64_t  nb1, nb2, nb3;
    float    clip;
};

// --- the tensor-core kernel (kron.cuh) ---

constexpr int GGML_EXT_KRON_MAX_WARPS = 16;
constexpr int GGML_EXT_KRON_REGISTERS = 128;  // per thread at most, which scripts/cuda-compile checks

// Byte offsets in shared memory. A factor lies as fragments of mma's A, 512 bytes per 16 x 16, once (f16) or twice (f16
// and the rest); X, then Z, as rows of n2 padded to a multiple of 16, and 16 bytes that keep ldmatrix free of conflicts.
struct ggml_ext_kron_layout {
    int    rows, columns;  // n1 and n2 padded to multiples of 16
    int    stride;         // f16 elements
    size_t right, x, x_plane, groups, cells, total;
};

#ifdef __CUDACC__
__host__ __device__
#endif
inline ggml_ext_kron_layout
ggml_ext_kron_layout_of(int n1, int n2, ggml_ext_kron_kind left, ggml_ext_kron_kind right, int terms) {
    ggml_ext_kron_layout l;
    l.rows                    = (n1 + 15) / 16 * 16;
    l.columns                 = (n2 + 15) / 16 * 16;
    l.stride                  = l.columns + 8;
    const size_t left_planes  = left == GGML_EXT_KRON_NONE ? 0 : terms > 1 && left == GGML_EXT_KRON_F32 ? 2 : 1;
    const size_t right_planes = right == GGML_EXT_KRON_NONE ? 0 : terms > 1 && right == GGML_EXT_KRON_F32 ? 2 : 1;
    l.right                   = left_planes * l.rows * l.rows * 2;
    l.x                       = l.right + right_planes * l.columns * l.columns * 2;
    l.x_plane                 = size_t(l.rows) * l.stride * 2;
    l.groups                  = l.x + (terms > 1 ? 2 : 1) * l.x_plane;
    l.cells                   = l.groups + (size_t(n1) * n2 / 256 * 4 + 15) / 16 * 16;
    l.total                   = l.cells + 2 * GGML_EXT_KRON_MAX_WARPS * 4;
    return l;
}

// A unit of work is 16 rows by 8 n_tiles columns of a product; a warp holds at most `units` of them in registers.
struct ggml_ext_kron_plan {
    bool     tensor_cores;  // otherwise the general kernels
    int      n_tiles, units, n_warps;
    size_t   shared_bytes;
    unsigned n_blocks;
};

inline int ggml_ext_kron_units(int n1, int n2, bool left, bool right, int n_tiles) {
    const int rows = (n1 + 15) / 16, columns = (n2 + 15) / 16, span = n_tiles / 2;
    const int first  = left ? rows * ((columns + span - 1) / span) : 0;
    const int second = right ? columns * ((rows + span - 1) / span) : 0;
    return std::max(first, second);
}

// aligned: all rows of x start at multiples of 16 bytes. terms: 1 (f16) or 3 (f16 with the rest). shared_limit: bytes
// that a block may have.
inline ggml_ext_kron_plan ggml_ext_kron_plan_of(const ggml_ext_kron_shape & s, ggml_ext_kron_kind left,
                                                ggml_ext_kron_kind right, int terms, bool aligned, size_t shared_limit,
                                                int n_sms) {
    ggml_ext_kron_plan p = {};
    const bool         l = left != GGML_EXT_KRON_NONE, r = right != GGML_EXT_KRON_NONE;
    p.shared_bytes = ggml_ext_kron_layout_of(s.n1, s.n2, left, right, terms).total;
    if ((!l && !r) || s.n1 > 256 || s.n2 > 256 || s.n2 % 4 != 0 || !aligned || p.shared_bytes > shared_limit) {
        return p;
    }
    const int fine   = ggml_ext_kron_units(s.n1, s.n2, l, r, 2);
    const int coarse = ggml_ext_kron_units(s.n1, s.n2, l, r, 8);
    if (coarse > 2 * GGML_EXT_KRON_MAX_WARPS) {
        return p;
    }
    // Few tokens: what counts is how soon one is done, so its work goes to as many warps as there are. Many: blocks of at
    // most 8 warps, of which an SM holds several, so that one loads while another computes.
    const bool latency_bound = s.n_tokens <= n_sms;
    p.tensor_cores           = true;
    p.n_tiles                = latency_bound && fine <= GGML_EXT_KRON_MAX_WARPS ? 2 : 8;
    p.units =
        p.n_tiles == 8 && coarse > (latency_bound ? GGML_EXT_KRON_MAX_WARPS : GGML_EXT_KRON_MAX_WARPS / 2) ? 2 : 1;
    p.n_warps        = std::max((p.n_tiles == 2 ? fine : coarse + p.units - 1) / p.units, 4);
    const int per_sm = std::max(1, std::min(ggml_ext::blocks_by_shared(shared_limit, p.shared_bytes),
                                            ggml_ext::blocks_by_registers(GGML_EXT_KRON_REGISTERS, 32 * p.n_warps)));
    p.n_blocks       = unsigned(std::min(s.n_tokens, int64_t(n_sms) * per_sm));
    return p;
}
