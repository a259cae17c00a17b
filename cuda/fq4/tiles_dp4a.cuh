// Products of FQ4 or FQ4_64 weights and many columns of int8 activations without tensor cores: sm_61 to sm_74. A tile is 64 rows
// and 32 columns; a block of each row is decoded once into shared memory.

#pragma once

#include "fq4.cuh"
#include "tiles_columns.cuh"

constexpr int GGML_EXT_FQ4_DP4A_THREADS = 128;
constexpr int GGML_EXT_FQ4_DP4A_ROWS    = 64;

inline ggml_ext_fq4_tiling ggml_ext_fq4_dp4a_tiling(int64_t m, int64_t n, int64_t n_batches, int64_t n_experts) {
    constexpr int       columns = GGML_EXT_FQ4_TILE_DP4A;
    ggml_ext_fq4_tiling t       = {};
    t.columns                   = columns;
    t.row_tiles                 = int((m + GGML_EXT_FQ4_DP4A_ROWS - 1) / GGML_EXT_FQ4_DP4A_ROWS);
    t.column_tiles              = int(n_experts ? n / columns + n_experts : (n + columns - 1) / columns * n_batches);
    t.n_ranges                  = t.row_tiles * t.column_tiles;
    return t;
}

// sum + the dot product of four int8 with four.
static __device__ __forceinline__ int ggml_ext_fq4_dp4a(uint32_t a, uint32_t b, int sum) {
#if GGML_EXT_CUDA_ARCH >= 610
    return __dp4a(int(a), int(b), sum);
#else
    ggml_ext::unreachable_arch();
    return sum;
#endif
}

// Thread block i computes tile i.
template <typename L>
static __global__ void __launch_bounds__(GGML_EXT_FQ4_DP4A_THREADS) ggml_ext_fq4_tiles_dp4a(
    const ggml_ext_fq4_product p) {
    using namespace ggml_ext;
    constexpr int       ROWS = GGML_EXT_FQ4_DP4A_ROWS, COLUMNS = GGML_EXT_FQ4_TILE_DP4A;
    // The words of a block and one of padding: words i of different rows lie in different banks.
    constexpr int       WORDS = L::weights / 4;
    __shared__ uint32_t weights[ROWS][WORDS + 1], codes[COLUMNS][WORDS + 1];
    __shared__ float    weight_scales[ROWS], scales[COLUMNS];
    __shared__ uint4    table[16];
    __shared__ int32_t  activation[COLUMNS];
    __shared__ int64_t  result[COLUMNS];
    fq4_load_table(table);
    const fq4_tile tile = fq4_find_tile<COLUMNS>(p, blockIdx.x, ROWS, activation, result);
    if (tile.n_columns <= 0) {
        return;
    }
    // This thread decodes half a row, and multiplies rows own_row + 16 i with columns own_column + 8 j.
    const int row = threadIdx.x / 2, half_row = threadIdx.x % 2;
    const int own_row = threadIdx.x % 16, own_column = threadIdx.x / 16;
    float     sums[4][4] = {};
    for (int block = 0; block < p.n_blocks; block++) {
        __syncthreads();
        if (row < tile.n_rows) {
            const char * from   = tile.weights + row * p.nb1 + int64_t(block) * L::bytes;
            weight_scales[row]  = L::scale(from);
            constexpr int PARTS = L::weights / 64;  // of half a row
            for (int part = PARTS * half_row; part < PARTS * (half_row + 1); part++) {
                const int   first = fq4_first_weight<L>(part);
                const uint4 low   = table[fq4_row_of<L>(from, first / 16)];
                const uint4 high  = table[fq4_row_of<L>(from, (first + L::run) / 16)];
                for (int w = 0; w < 4; w++) {
                    const uint32_t split                   = fq4_split(L::word(from + L::q + 16 * part + 4 * w));
                    weights[row][first / 4 + w]            = fq4_lookup(low, split, 0);
                    weights[row][(first + L::run) / 4 + w] = fq4_lookup(high, split, 1);
                }
            }
        }
        for (int i = threadIdx.x; i < COLUMNS * WORDS; i += GGML_EXT_FQ4_DP4A_THREADS) {
            const int8_t * from         = p.codes + (int64_t(activation[i / WORDS]) * p.n_blocks + block) * L::weights;
            codes[i / WORDS][i % WORDS] = reinterpret_cast<const uint32_t *>(from)[i % WORDS];
        }
        if (threadIdx.x < COLUMNS) {
            scales[threadIdx.x] = p.scales[block * p.n_activations + activation[threadIdx.x]];
        }
        __syncthreads();
        int products[4][4] = {};
        for (int w = 0; w < WORDS; w++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    products[i][j] =
                        ggml_ext_fq4_dp4a(weights[own_row + 16 * i][w], codes[own_column + 8 * j][w], products[i][j]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                sums[i][j] += weight_scales[own_row + 16 * i] * scales[own_column + 8 * j] * float(products[i][j]);
            }
        }
    }
    for (int i = 0; i < 4; i++) {
        for (int j = 0; j < 4; j++) {
            const int column = own_column + 8 * j;
            if (own_row + 16 * i < tile.n_rows && column < tile.n_columns) {
                p.dst[result[column] + own_row + 16 * i] = sums[i][j];
            }
        }
    }
}
