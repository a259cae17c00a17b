// Products of FQ4 weights and many columns of int8 activations on tensor cores, sm_75 and newer.
//
// A thread block of four warps has a tile of 128 rows; a warp keeps the operands of its own 32 rows and one block
// (256 weights) in registers (tiles_decode.cuh), so decoded weights never pass through shared memory, and multiplies
// them with all columns of the tile, eight at a time. The int32 sums of a block start from the bits of magic = 1.5 2^23
// (numerics.h): |sum| <= 256 127 127 < 2^22, and
//
//     result += dx (dw (magic + sum) - dw magic)
//
// is two fused multiply-adds: dw has 11 bits, so the subtrahend is exact, and the first rounds only dw sum.
//
// Shared memory: the table; per warp, one block of its 32 rows as it lies in memory, refilled as soon as it is decoded;
// activations in slices of up to 64 columns, one slot more than a step has slices, so that a slice is copied one step
// ahead; its column's 256 codes as 16 chunks of 16 bytes, chunk c at c ^ (4 (column % 2)): a quarter-warp reads chunks
// 4 i .. 4 i + 3 of two columns, 8 different bank groups.

#pragma once

#include "common/numerics.h"
#include "tiles_columns.cuh"
#include "tiles_decode.cuh"

#include <type_traits>

namespace ggml_ext {

// What a thread block is at. In shared memory, as the inner loop needs every register.
struct fq4_part {
    fq4_tile tile;
    int      first_block, end_block;  // of the tile
    int      end_step;                // of the thread block's range
    int      unused;
};

template <int COLUMNS> struct fq4_tile_shape {
    static constexpr int slice    = COLUMNS < 64 ? COLUMNS : 64;
    static constexpr int n_slices = COLUMNS / slice;
    static constexpr int n_slots  = n_slices + 1;

    // Offsets in shared memory.
    static constexpr int raw        = sizeof(fq4_spread);
    static constexpr int codes      = raw + 4 * FQ4_RAW_WORDS * 4;
    static constexpr int scales     = codes + n_slots * slice * 256;
    static constexpr int result     = scales + n_slots * slice * 4;
    static constexpr int activation = result + COLUMNS * 8;
    static constexpr int part       = activation + COLUMNS * 4;
    static_assert(part + sizeof(fq4_part) == ggml_ext_fq4_tile_shared(COLUMNS), "the launchers' size");
};

// Copies block `block` of the warp's rows. n_rows may be <= 0; rows past it keep what they had.
__device__ __forceinline__ void fq4_copy_rows(uint32_t * raw, const char * weights, int64_t nb1, int n_rows) {
    const int     lane   = threadIdx.x % 32;
    // Rows of equal parity are a multiple of 4 bytes apart.
    const auto    word   = [](const char * p) { return reinterpret_cast<const char *>(uintptr_t(p) & ~uintptr_t(3)); };
    const char *  even   = word(weights);
    const char *  odd    = word(weights + nb1);
    const int64_t stride = 2 * nb1;
    if (n_rows >= 32) {
        const char * from_even = even + 4 * lane;
        const char * from_odd  = odd + 4 * lane;
#pragma unroll
        for (int r = 0; r < 32; r += 2) {
            cp_async<4>(raw + fq4_raw_row(r) + lane, from_even);
            cp_async<4>(raw + fq4_raw_row(r + 1) + lane, from_odd);
            from_even += stride;
            from_odd += stride;
        }
    } else {
        for (int r = 0; r < n_rows; r++) {
            cp_async<4>(raw + fq4_raw_row(r) + lane, (r % 2 ? odd : even) + r / 2 * stride + 4 * lane);
        }
    }
    // The last three words of a row, for lane = row.
    if (lane < n_rows) {
        const char * from = (lane % 2 ? odd : even) + lane / 2 * stride + 128;
#pragma unroll
        for (int w = 0; w < 3; w++) {
            cp_async<4>(raw + fq4_raw_row(lane) + 32 + w, from + 4 * w);
        }
    }
}

// Copies block `block` of `slice` columns, whose activations are named at `activation`, to a slot.
template <int COLUMNS>
__device__ __forceinline__ void fq4_copy_slice(char * shared, int slot, const int32_t * activation,
                                               const ggml_ext_fq4_product & p, int block) {
    using shape      = fq4_tile_shape<COLUMNS>;
    const int chunk  = threadIdx.x % 16;
    const int column = threadIdx.x / 16;  // and every eighth from here on
    char *    to     = shared + shape::codes + slot * shape::slice * 256 + column * 256 + (chunk ^ column % 2 * 4) * 16;
    const int8_t * at = p.codes + int64_t(block) * 256 + chunk * 16;
#pragma unroll
    for (int i = 0; i < shape::slice / 8; i++) {
        cp_async<16>(to + i * 8 * 256, at + int64_t(activation[column + 8 * i]) * p.k);
    }
    if (threadIdx.x < shape::slice) {
        float * scales = reinterpret_cast<float *>(shared + shape::scales) + slot * shape::slice;
        cp_async<4>(scales + threadIdx.x, p.scales + block * p.n_activations + activation[threadIdx.x]);
    }
}

// sums[16 rows][8 columns][element of mma's d] += the block's products with the columns of a slot.
template <int COLUMNS, int SLICE>
__device__ __forceinline__ void fq4_multiply_slice(float (&sums)[2][COLUMNS / 8][4], const fq4_fragments & f,
                                                   const char * codes, const float * scales) {
    const int32_t start[4] = { magic_bits, magic_bits, magic_bits, magic_bits };
    const int     g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    constexpr int slice = fq4_tile_shape<COLUMNS>::slice;
    const char *  own   = codes + g * 256 + (t ^ g % 2 * 4) * 16;
    // Two groups of 8 columns at a time: four independent chains of mma.
#pragma unroll
    for (int n = 0; n < slice / 8; n += 2) {
        int32_t products[2][2][4];  // [8 columns][16 rows]
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint32_t b[2][2][2];  // [8 columns][mma]
#pragma unroll
            for (int c = 0; c < 2; c++) {
                // Chunk 4 i + t, swizzled.
                const uint4 x = *reinterpret_cast<const uint4 *>(own + (n + c) * 8 * 256 + i / 2 * 128 +
                                                                 (i % 2 ? (g % 2 ? -64 : 64) : 0));
                b[c][0][0]    = x.x;
                b[c][0][1]    = x.y;
                b[c][1][0]    = x.z;
                b[c][1][1]    = x.w;
            }
#pragma unroll
            for (int half_mma = 0; half_mma < 2; half_mma++) {
#pragma unroll
                for (int chain = 0; chain < 4; chain++) {
                    const int c = chain / 2, rows = chain % 2;
                    if (i == 0 && half_mma == 0) {
                        mma_s8(products[c][rows], f.a[rows][i][half_mma], b[c][half_mma], start);
                    } else {
                        mma_s8(products[c][rows], f.a[rows][i][half_mma], b[c][half_mma]);
                    }
                }
            }
        }
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const float2 dx = *reinterpret_cast<const float2 *>(scales + (n + c) * 8 + 2 * t);
#pragma unroll
            for (int rows = 0; rows < 2; rows++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float dw      = f.d[rows][e / 2];
                    const float product = fmaf(__int_as_float(products[c][rows][e]), dw, -magic * dw);
                    float &     sum     = sums[rows][SLICE * slice / 8 + n + c][e];
                    sum                 = fmaf(product, e % 2 ? dx.y : dx.x, sum);
                }
            }
        }
    }
}

// sums = the part's blocks of its tile. All threads of the block come here together.
template <int COLUMNS>
__device__ __forceinline__ void fq4_multiply_tile(float (&sums)[2][COLUMNS / 8][4], char * shared,
                                                  const fq4_part & part, const ggml_ext_fq4_product & p) {
    using shape           = fq4_tile_shape<COLUMNS>;
    const int       first = threadIdx.x / 32 * 32, g = threadIdx.x % 32 / 4;
    uint32_t *      raw        = reinterpret_cast<uint32_t *>(shared + shape::raw) + threadIdx.x / 32 * FQ4_RAW_WORDS;
    const int32_t * activation = reinterpret_cast<const int32_t *>(shared + shape::activation);
    const int       begin      = part.first_block;
    const auto      n_rows     = [&] { return part.tile.n_rows - first; };
    const auto      weights    = [&](int block) {
        return part.tile.weights + first * p.nb1 + int64_t(block) * GGML_EXT_FQ4_BLOCK_BYTES;
    };

    // See fq4_decode; a block is 2 more than a multiple of 4 bytes, so all bits flip from one to the next.
    unsigned odd = 0;
    for (int i = 0; i < 4; i++) {
        odd |= unsigned(uintptr_t(weights(begin) + (8 * i + g) * p.nb1) >> 1 & 1) << i;
    }
#pragma unroll
    for (int rows = 0; rows < 2; rows++) {
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                sums[rows][n][e] = 0.0f;
            }
        }
    }

    // Group number j of cp_async has slice j, counted over the blocks, and for the first slice of a block its rows.
    fq4_copy_rows(raw, weights(begin), p.nb1, n_rows());
#pragma unroll
    for (int s = 0; s < shape::n_slices; s++) {
        fq4_copy_slice<COLUMNS>(shared, s, activation + s * shape::slice, p, begin);
        cp_async_commit();
    }
    fq4_fragments f;
    int           slot = 0;
    const auto    step = [&](auto slice, int block) {
        constexpr int s = decltype(slice)::value;
        // Slice s and, for s = 0, the rows are here; and all warps have left the slice before, whose slot is filled next.
        cp_async_wait<shape::n_slices - 1>();
        __syncthreads();
        const bool more = block + 1 < part.end_block, active = n_rows() > 0;
        if (more) {
            fq4_copy_slice<COLUMNS>(shared, slot ? slot - 1 : shape::n_slices, activation + s * shape::slice, p,
                                       block + 1);
        }
        if (s == 0 && active) {
            fq4_decode(f, raw, *reinterpret_cast<const fq4_spread *>(shared), odd);
            odd = ~odd;
            __syncwarp();
            if (more) {
                fq4_copy_rows(raw, weights(block + 1), p.nb1, n_rows());
            }
        }
        cp_async_commit();
        if (active) {
            fq4_multiply_slice<COLUMNS, s>(
                sums, f, shared + shape::codes + slot * shape::slice * 256,
                reinterpret_cast<const float *>(shared + shape::scales) + slot * shape::slice);
        }
        slot = slot == shape::n_slices ? 0 : slot + 1;
    };
    for (int block = begin; block < part.end_block; block++) {
        step(std::integral_constant<int, 0>(), block);
        if constexpr (shape::n_slices > 1) {
            step(std::integral_constant<int, 1>(), block);
        }
    }
    static_assert(shape::n_slices <= 2, "slices of the loop");
}

template <int COLUMNS>
__device__ __forceinline__ void fq4_store_part(const float (&sums)[2][COLUMNS / 8][4], const fq4_part & part,
                                               const int64_t * offsets, const ggml_ext_fq4_product & p) {
    const bool partial = part.first_block > 0;
    float *    to      = partial ? p.partial + int64_t(blockIdx.x) * COLUMNS * GGML_EXT_FQ4_TILE_ROWS : p.dst;
    const int  g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; n++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int column = 8 * n + 2 * t + e;
            if (column < part.tile.n_columns) {
                float * results = to + (partial ? column * GGML_EXT_FQ4_TILE_ROWS : offsets[column]);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int row = threadIdx.x / 32 * 32 + 8 * i + g;
                    if (row < part.tile.n_rows) {
                        results[row] = sums[i / 2][n][i % 2 * 2 + e];
                    }
                }
            }
        }
    }
}

}  // namespace ggml_ext

// Thread block i computes range i (see ggml_ext_fq4_product). ggml_ext_fq4_tile_shared(COLUMNS) bytes.
template <int COLUMNS>
static __global__ void __launch_bounds__(GGML_EXT_FQ4_TILE_THREADS, ggml_ext_fq4_tile_residents(COLUMNS))
ggml_ext_fq4_tiles_kernel(const ggml_ext_fq4_product p) {
    using namespace ggml_ext;
    using shape = fq4_tile_shape<COLUMNS>;
    GGML_EXT_DYNAMIC_SHARED(char, shared);
    int32_t *  activation = reinterpret_cast<int32_t *>(shared + shape::activation);
    int64_t *  result     = reinterpret_cast<int64_t *>(shared + shape::result);
    fq4_part & part       = *reinterpret_cast<fq4_part *>(shared + shape::part);
    fq4_spread_table(*reinterpret_cast<fq4_spread *>(shared), threadIdx.x);

    const int n_steps = p.row_tiles * p.column_tiles * p.n_blocks;
    int       at      = ggml_ext_fq4_range_begin(blockIdx.x, p.n_ranges, n_steps);
    if (threadIdx.x == 0) {
        part.end_step = ggml_ext_fq4_range_begin(blockIdx.x + 1, p.n_ranges, n_steps);
    }
    __syncthreads();
    while (at < part.end_step) {
        const int      first = at % p.n_blocks;
        const int      n     = min(p.n_blocks - first, part.end_step - at);
        const fq4_tile tile  = fq4_find_tile<COLUMNS>(p, at / p.n_blocks, GGML_EXT_FQ4_TILE_ROWS, activation, result);
        at += n;
        if (tile.n_columns <= 0) {
            continue;
        }
        if (threadIdx.x == 0) {
            part.tile        = tile;
            part.first_block = first;
            part.end_block   = first + n;
        }
        __syncthreads();
        float sums[2][COLUMNS / 8][4];
        fq4_multiply_tile<COLUMNS>(sums, shared, part, p);
        fq4_store_part<COLUMNS>(sums, part, result, p);
        __syncthreads();  // all threads have used what the next tile overwrites
    }
}

// Adds the parts of the tiles in which range blockIdx.x is the first to start inside, in the ranges' order: the same
// bits on every run. blockIdx.y: 8 columns. 128 threads, one row each.
template <int COLUMNS>
static __global__ void __launch_bounds__(GGML_EXT_FQ4_TILE_THREADS) ggml_ext_fq4_tiles_join(
    const ggml_ext_fq4_product p) {
    using namespace ggml_ext;
    __shared__ int32_t activation[COLUMNS];
    __shared__ int64_t result[COLUMNS];
    const int          n_steps = p.row_tiles * p.column_tiles * p.n_blocks;
    const auto         begin   = [&](int i) { return ggml_ext_fq4_range_begin(i, p.n_ranges, n_steps); };
    const int          own = blockIdx.x, i_tile = begin(own) / p.n_blocks;
    if (begin(own) % p.n_blocks == 0 || begin(own - 1) > i_tile * p.n_blocks) {
        return;
    }
    const fq4_tile tile = fq4_find_tile<COLUMNS>(p, i_tile, GGML_EXT_FQ4_TILE_ROWS, activation, result);
    __syncthreads();
    const int row = threadIdx.x;
    if (row >= tile.n_rows) {
        return;
    }
    for (int column = 8 * blockIdx.y; column < min(int(8 * blockIdx.y + 8), tile.n_columns); column++) {
        float * to  = p.dst + result[column] + row;
        float   sum = *to;
        for (int i = own; i < p.n_ranges && begin(i) < (i_tile + 1) * p.n_blocks; i++) {
            sum += p.partial[(int64_t(i) * COLUMNS + column) * GGML_EXT_FQ4_TILE_ROWS + row];
        }
        *to = sum;
    }
}
