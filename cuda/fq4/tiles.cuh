// Products of FQ4 or FQ4_64 weights and many columns of int8 activations on tensor cores, sm_75 and newer.
//
// A thread block of four warps has a tile of 128 rows; a warp keeps the operands of its own 32 rows and one block
// (256 weights, or 64) in registers (tiles_decode.cuh), so decoded weights never pass through shared memory, and multiplies
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
// 4 i .. 4 i + 3 of two columns, 8 different bank groups. FQ4_64: 64 codes as 4 chunks, chunk c at c ^ (2 (column / 2 % 2)):
// half a warp reads half of the chunks of four columns, 8 bytes a lane, 16 different pairs of banks.

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

template <typename L, int COLUMNS> struct fq4_tile_shape {
    static constexpr int slice    = COLUMNS < 64 ? COLUMNS : 64;
    static constexpr int n_slices = COLUMNS / slice;
    static constexpr int n_slots  = n_slices + 1;

    static constexpr int n_chunks  = L::weights / 16;                     // of a column
    static constexpr int raw_words = ggml_ext_fq4_raw_words(L::weights);  // of a warp

    // Where chunk c of a column lies.
    static __device__ __forceinline__ int place(int column, int c) {
        return L::weights == 256 ? c ^ column % 2 * 4 : c ^ (column & 2);
    }

    // Offsets in shared memory.
    static constexpr int raw        = sizeof(fq4_spread);
    static constexpr int codes      = raw + 4 * raw_words * 4;
    static constexpr int scales     = codes + n_slots * slice * L::weights;
    static constexpr int result     = scales + n_slots * slice * 4;
    static constexpr int activation = result + COLUMNS * 8;
    static constexpr int part       = activation + COLUMNS * 4;
    static_assert(part + sizeof(fq4_part) == ggml_ext_fq4_tile_shared(COLUMNS, L::weights), "the launchers' size");
};

// Copies a block of the warp's rows. n_rows may be <= 0; rows past it keep what they had.
__device__ __forceinline__ void fq4_copy_rows(fq4_layout, uint32_t * raw, const char * weights, int64_t nb1,
                                              int n_rows) {
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
            cp_async<4>(raw + fq4_raw_row<fq4_layout>(r) + lane, from_even);
            cp_async<4>(raw + fq4_raw_row<fq4_layout>(r + 1) + lane, from_odd);
            from_even += stride;
            from_odd += stride;
        }
    } else {
        for (int r = 0; r < n_rows; r++) {
            cp_async<4>(raw + fq4_raw_row<fq4_layout>(r) + lane, (r % 2 ? odd : even) + r / 2 * stride + 4 * lane);
        }
    }
    // The last three words of a row, for lane = row.
    if (lane < n_rows) {
        const char * from = (lane % 2 ? odd : even) + lane / 2 * stride + 128;
#pragma unroll
        for (int w = 0; w < 3; w++) {
            cp_async<4>(raw + fq4_raw_row<fq4_layout>(lane) + 32 + w, from + 4 * w);
        }
    }
}

__device__ __forceinline__ void fq4_copy_rows(fq4_64_layout, uint32_t * raw, const char * weights, int64_t nb1,
                                              int n_rows) {
    const int    lane  = threadIdx.x % 32;
    const auto   start = [](const char * p) { return int(uintptr_t(p) % 4); };
    // Words 0-7 of four rows at a time: every fourth row starts alike.
    const char * own   = weights + lane / 8 * nb1;
    const char * from  = own - start(own) + lane % 8 * 4;
#pragma unroll
    for (int r = 0; r < 32; r += 4) {
        if (r + lane / 8 < n_rows) {
            cp_async<4>(raw + fq4_raw_row<fq4_64_layout>(r + lane / 8) + lane % 8, from);
        }
        from += 4 * nb1;
    }
    // The last words of a row, for lane = row: one or two hold bytes of it.
    if (lane < n_rows) {
        const char * row  = weights + lane * nb1;
        const char * rest = row - start(row) + 32;
        uint32_t *   to   = raw + fq4_raw_row<fq4_64_layout>(lane) + 8;
        cp_async<4>(to, rest);
        if (start(row) > 36 - fq4_64_layout::bytes) {
            cp_async<4>(to + 1, rest + 4);
        }
    }
}

// Copies block `block` of `slice` columns, whose activations are named at `activation`, to a slot.
template <typename L, int COLUMNS>
__device__ __forceinline__ void fq4_copy_slice(char * shared, int slot, const int32_t * activation,
                                               const ggml_ext_fq4_product & p, int block) {
    using shape           = fq4_tile_shape<L, COLUMNS>;
    constexpr int at_once = GGML_EXT_FQ4_TILE_THREADS / shape::n_chunks;  // columns
    const int     chunk   = threadIdx.x % shape::n_chunks;
    const int     column  = threadIdx.x / shape::n_chunks;                // and every at_once-th from here on
    char * to = shared + shape::codes + (slot * shape::slice + column) * L::weights + shape::place(column, chunk) * 16;
    const int8_t * at = p.codes + int64_t(block) * L::weights + chunk * 16;
    if (at_once <= shape::slice || column < shape::slice) {
#pragma unroll
        for (int i = 0; i < (shape::slice + at_once - 1) / at_once; i++) {
            cp_async<16>(to + i * at_once * L::weights, at + int64_t(activation[column + at_once * i]) * p.k);
        }
    }
    if (threadIdx.x < shape::slice) {
        float * scales = reinterpret_cast<float *>(shared + shape::scales) + slot * shape::slice;
        cp_async<4>(scales + threadIdx.x, p.scales + block * p.n_activations + activation[threadIdx.x]);
    }
}

// The operands of the 64 k number i, for mma 0 and 1. own: the lane's first bytes of its column.
__device__ __forceinline__ void fq4_load_codes(fq4_layout, uint32_t (&b)[2][2], const char * own, int i) {
    // Chunk 4 i + t, swizzled.
    const bool  odd = threadIdx.x / 4 % 2;
    const uint4 x   = *reinterpret_cast<const uint4 *>(own + i / 2 * 128 + (i % 2 ? (odd ? -64 : 64) : 0));
    b[0][0]         = x.x;
    b[0][1]         = x.y;
    b[1][0]         = x.z;
    b[1][1]         = x.w;
}

__device__ __forceinline__ void fq4_load_codes(fq4_64_layout, uint32_t (&b)[2][2], const char * own, int) {
    // 8 bytes of a chunk of the first run, and of the chunk two on, swizzled.
    const bool  swapped = threadIdx.x / 8 % 2;
    const uint2 low     = *reinterpret_cast<const uint2 *>(own);
    const uint2 high    = *reinterpret_cast<const uint2 *>(own + (swapped ? -32 : 32));
    b[0][0]             = low.x;
    b[0][1]             = low.y;
    b[1][0]             = high.x;
    b[1][1]             = high.y;
}

// sums[16 rows][8 columns][element of mma's d] += the block's products with the columns of a slot.
template <typename L, int COLUMNS, int SLICE>
__device__ __forceinline__ void fq4_multiply_slice(float (&sums)[2][COLUMNS / 8][4], const fq4_fragments<L> & f,
                                                   const char * codes, const float * scales) {
    const int32_t start[4] = { magic_bits, magic_bits, magic_bits, magic_bits };
    const int     g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    using shape         = fq4_tile_shape<L, COLUMNS>;
    constexpr int slice = shape::slice;
    // Chunk t of FQ4, half of chunk t / 2 of FQ4_64.
    const char *  own   = codes + g * L::weights +
                       (L::weights == 256 ? shape::place(g, t) * 16 : shape::place(g, t / 2) * 16 + t % 2 * 8);
    // Two groups of 8 columns at a time: four independent chains of mma.
#pragma unroll
    for (int n = 0; n < slice / 8; n += 2) {
        int32_t products[2][2][4];  // [8 columns][16 rows]
#pragma unroll
        for (int i = 0; i < L::weights / 64; i++) {
            uint32_t b[2][2][2];  // [8 columns][mma]
#pragma unroll
            for (int c = 0; c < 2; c++) {
                fq4_load_codes(L(), b[c], own + (n + c) * 8 * L::weights, i);
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
template <typename L, int COLUMNS>
__device__ __forceinline__ void fq4_multiply_tile(float (&sums)[2][COLUMNS / 8][4], char * shared,
                                                  const fq4_part & part, const ggml_ext_fq4_product & p) {
    using shape           = fq4_tile_shape<L, COLUMNS>;
    const int       first = threadIdx.x / 32 * 32, g = threadIdx.x % 32 / 4;
    uint32_t *      raw = reinterpret_cast<uint32_t *>(shared + shape::raw) + threadIdx.x / 32 * shape::raw_words;
    const int32_t * activation = reinterpret_cast<const int32_t *>(shared + shape::activation);
    const int       begin      = part.first_block;
    const auto      n_rows     = [&] { return part.tile.n_rows - first; };
    const auto      weights = [&](int block) { return part.tile.weights + first * p.nb1 + int64_t(block) * L::bytes; };

    // See fq4_decode.
    unsigned starts = 0;
    for (int i = 0; i < 4; i++) {
        starts |= unsigned(uintptr_t(weights(begin) + (8 * i + g) * p.nb1) & 3) << 8 * i;
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
    fq4_copy_rows(L(), raw, weights(begin), p.nb1, n_rows());
#pragma unroll
    for (int s = 0; s < shape::n_slices; s++) {
        fq4_copy_slice<L, COLUMNS>(shared, s, activation + s * shape::slice, p, begin);
        cp_async_commit();
    }
    fq4_fragments<L> f;
    int              slot = 0;
    const auto       step = [&](auto slice, int block) {
        constexpr int s = decltype(slice)::value;
        // Slice s and, for s = 0, the rows are here; and all warps have left the slice before, whose slot is filled next.
        cp_async_wait<shape::n_slices - 1>();
        __syncthreads();
        const bool more = block + 1 < part.end_block, active = n_rows() > 0;
        if (more) {
            fq4_copy_slice<L, COLUMNS>(shared, slot ? slot - 1 : shape::n_slices, activation + s * shape::slice, p,
                                             block + 1);
        }
        if (s == 0 && active) {
            fq4_decode(f, raw, *reinterpret_cast<const fq4_spread *>(shared), starts);
            starts = (starts + L::bytes % 4 * 0x01010101) & 0x03030303;
            __syncwarp();
            if (more) {
                fq4_copy_rows(L(), raw, weights(block + 1), p.nb1, n_rows());
            }
        }
        cp_async_commit();
        if (active) {
            fq4_multiply_slice<L, COLUMNS, s>(
                sums, f, shared + shape::codes + slot * shape::slice * L::weights,
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

// Thread block i computes range i (see ggml_ext_fq4_product). ggml_ext_fq4_tile_shared(COLUMNS, L::weights) bytes.
template <typename L, int COLUMNS>
static __global__ void __launch_bounds__(GGML_EXT_FQ4_TILE_THREADS, ggml_ext_fq4_tile_residents(COLUMNS))
ggml_ext_fq4_tiles_kernel(const ggml_ext_fq4_product p) {
    using namespace ggml_ext;
    using shape = fq4_tile_shape<L, COLUMNS>;
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
        fq4_multiply_tile<L, COLUMNS>(sums, shared, part, p);
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
