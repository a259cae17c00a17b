// Blocks of FQ4 or FQ4_64 to F32, F16 or BF16: rows picked by index (GET_ROWS) or all of them (CPY).

#pragma once

#include "common/device.cuh"
#include "fq4.cuh"

// Rows of blocks x to rows of values y. Row j of y is (i1, i2, i3) = (j % ne1, j / ne1 % ne2, j / (ne1 ne2)); with ids,
// its source is row ids[i1, i2, i3] of matrix (i2, i3) of x, else row (i1, i2, i3).
struct ggml_ext_fq4_dequantize_args {
    const char * x;
    const char * ids;                          // NULL, or int32
    char *       y;
    int          n_blocks;                     // of a row
    int64_t      ne1, ne2, n_rows;
    int64_t      nb_x[4], nb_ids[4], nb_y[4];  // bytes; [0] is not used by x and y, nb_ids[0] is the step of i1
};

constexpr int ggml_ext_fq4_dequantize_warps = 4;  // of a thread block; a warp decodes 256 weights at a time

namespace ggml_ext {

template <typename T> __device__ __forceinline__ T fq4_convert(float x);
template <> __device__ __forceinline__ float       fq4_convert(float x) {
    return x;
}
template <> __device__ __forceinline__ half fq4_convert(float x) {
    return __float2half(x);
}
template <> __device__ __forceinline__ nv_bfloat16 fq4_convert(float x) {
    return __float2bfloat16(x);
}

template <typename T> struct alignas(4 * sizeof(T)) fq4_four {
    T v[4];
};

// y[0 .. 3] = d T[s][codes 4 half .. 4 half + 3]
template <typename T>
__device__ __forceinline__ void fq4_write_four(T * y, float d, const uint4 & row, uint32_t codes, int half) {
    const uint32_t w = fq4_lookup(row, codes, half);
    fq4_four<T>    out;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        out.v[i] = fq4_convert<T>(d * float(int8_t(w >> 8 * i)));
    }
    *reinterpret_cast<fq4_four<T> *>(y) = out;
}

// Word `word` of a block's q: four weights of the low nibbles, four of the high ones.
template <typename L, typename T>
__device__ __forceinline__ void fq4_dequantize_word(const char * block, T * y, int word, const uint4 (&table)[16]) {
    const int      first = fq4_first_weight<L>(word / 4) + word % 4 * 4;
    const float    d     = L::scale(block);
    const uint32_t codes = fq4_split(L::word(block + L::q + 4 * word));
    fq4_write_four(y + first, d, table[fq4_row_of<L>(block, first / 16)], codes, 0);
    fq4_write_four(y + first + L::run, d, table[fq4_row_of<L>(block, (first + L::run) / 16)], codes, 1);
}

}  // namespace ggml_ext

// Warps walk over all blocks of all rows, as many at a time as they have words for.
template <typename L, typename T>
static __global__ void ggml_ext_fq4_dequantize_kernel(const ggml_ext_fq4_dequantize_args a) {
    constexpr int    words = L::weights / 8, n_together = 32 / words;
    __shared__ uint4 table[16];
    ggml_ext::fq4_load_table(table);
    __syncthreads();
    const int     lane    = threadIdx.x % 32;
    const int64_t n_warps = int64_t(gridDim.x) * ggml_ext_fq4_dequantize_warps;
    const int64_t warp    = int64_t(blockIdx.x) * ggml_ext_fq4_dequantize_warps + threadIdx.x / 32;
    for (int64_t i = warp * n_together + lane / words; i < a.n_rows * a.n_blocks; i += n_warps * n_together) {
        const int64_t row = i / a.n_blocks, block = i % a.n_blocks;
        const int64_t i1 = row % a.ne1, i2 = row / a.ne1 % a.ne2, i3 = row / (a.ne1 * a.ne2);
        int64_t       source = i1;
        if (a.ids) {
            source = *reinterpret_cast<const int32_t *>(a.ids + i1 * a.nb_ids[0] + i2 * a.nb_ids[1] + i3 * a.nb_ids[2]);
        }
        const char * x = a.x + source * a.nb_x[1] + i2 * a.nb_x[2] + i3 * a.nb_x[3];
        char *       y = a.y + i1 * a.nb_y[1] + i2 * a.nb_y[2] + i3 * a.nb_y[3];
        ggml_ext::fq4_dequantize_word<L>(x + block * L::bytes, reinterpret_cast<T *>(y) + L::weights * block,
                                         lane % words, table);
    }
}
