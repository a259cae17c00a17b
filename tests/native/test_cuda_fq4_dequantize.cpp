// FQ4, or FQ4_64, to F32, F16 and BF16 on CUDA, in the emulator, against the type's dequantize_row: bit for bit, as d T[s][q] is
// one rounding to float and the conversions round to nearest.
//
// Would break it: a wrong nibble, table row or element order (random blocks), a wrong row, matrix or stride, writing
// beyond a row (poison).

#include "check.h"
#include "fq4-layout.h"
#include "fq4/dequantize.cuh"

namespace {

using fq4_reference::BLOCK;
using fq4_reference::BLOCK_BYTES;

std::mt19937 rng(3);

float as_float(float x) {
    return x;
}

float as_float(half x) {
    return __half2float(x);
}

float as_float(nv_bfloat16 x) {
    return __bfloat162float(x);
}

// What the reference gives in type T.
float rounded(float x, float) {
    return x;
}

float rounded(float x, half) {
    return ggml_fp16_to_fp32(ggml_fp32_to_fp16(x));
}

float rounded(float x, nv_bfloat16) {
    return ggml_bf16_to_fp32(ggml_fp32_to_bf16(x));
}

// n_ids == 0: all rows.
template <typename T> void check(int n_blocks, int n_rows, int ne2, int ne3, int n_ids, unsigned n_thread_blocks) {
    const int            k = n_blocks * BLOCK, pad = 8;         // unused values after each row of y
    const int            matrices = ne2 * ne3, ne1 = n_ids ? n_ids : n_rows;
    const size_t         x_row = (n_blocks + 1) * BLOCK_BYTES;  // a block between rows
    std::vector<uint8_t> x(matrices * n_rows * x_row + fq4_reference::layout::alignment);
    uint8_t *            x_data = x.data() + fq4_reference::layout::alignment;
    std::vector<float>   expected(size_t(matrices) * n_rows * k);
    for (int i = 0; i < matrices * n_rows; i++) {
        for (int b = 0; b < n_blocks; b++) {
            fq4_reference::random_block(rng, 0.01f * float(rng() % 100), x_data + i * x_row + b * BLOCK_BYTES);
        }
        fq4_reference::dequantize_row(x_data + i * x_row, &expected[size_t(i) * k], k);
    }
    std::vector<int32_t> ids(matrices * n_ids);
    for (int32_t & id : ids) {
        id = int32_t(rng() % unsigned(n_rows));
    }
    std::vector<T> y(size_t(matrices) * ne1 * (k + pad));
    std::memset((void *) y.data(), 0xff, y.size() * sizeof(T));

    ggml_ext_fq4_dequantize_args args = {};
    args.x                            = (const char *) x_data;
    args.ids                          = n_ids ? (const char *) ids.data() : nullptr;
    args.y                            = (char *) y.data();
    args.n_blocks                     = n_blocks;
    args.ne1                          = ne1;
    args.ne2                          = ne2;
    args.n_rows                       = int64_t(matrices) * ne1;
    const auto strides                = [&](int64_t (&nb)[4], int64_t first, int64_t n1) {
        nb[1] = first;
        nb[2] = first * n1;
        nb[3] = nb[2] * ne2;
    };
    strides(args.nb_x, x_row, n_rows);
    strides(args.nb_y, (k + pad) * sizeof(T), ne1);
    args.nb_ids[0] = 4;
    args.nb_ids[1] = 4 * n_ids;
    args.nb_ids[2] = 4 * n_ids * ne2;
    ggml_ext_cuda_launch(ggml_ext_fq4_dequantize_kernel<fq4_reference::layout, T>, dim3(n_thread_blocks),
                         dim3(32 * ggml_ext_fq4_dequantize_warps), 0, nullptr, args);

    for (int m = 0; m < matrices; m++) {
        for (int i = 0; i < ne1; i++) {
            const int     row  = n_ids ? ids[m * n_ids + i] : i;
            const T *     got  = &y[size_t(m * ne1 + i) * (k + pad)];
            const float * want = &expected[size_t(m * n_rows + row) * k];
            for (int j = 0; j < k; j++) {
                CHECK(as_float(got[j]) == rounded(want[j], T()), "%zu bytes, matrix %d, row %d, value %d: %g, not %g",
                      sizeof(T), m, i, j, as_float(got[j]), want[j]);
            }
            for (int j = k; j < k + pad; j++) {
                CHECK(std::isnan(as_float(got[j])), "matrix %d, row %d: written beyond the end", m, i);
            }
        }
    }
}

template <typename T> void check_all() {
    check<T>(1, 1, 1, 1, 0, 1);
    check<T>(3, 5, 2, 3, 0, 2);
    check<T>(2, 9, 1, 1, 4, 3);
    check<T>(5, 6, 3, 2, 7, 4);
}

}  // namespace

int main() {
    check_all<float>();
    check_all<half>();
    check_all<nv_bfloat16>();
    return check_done();
}
