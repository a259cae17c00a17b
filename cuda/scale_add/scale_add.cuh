// GGML_EXT_OP_SCALE_ADD, device code: the plainest kernel, kept as the example of docs/adding-an-op.md.

#pragma once

#include "common/device.cuh"

// Element counts and byte strides as in ggml. Rows are contiguous (nb[0] == 4).
struct ggml_ext_scale_add_shape {
    int64_t ne[4];
    int64_t nb_a[4], nb_b[4], nb_y[4];
};

// y = scale * a + b. A block per row, in a grid-stride loop over rows; its threads walk ne[0].
static __global__ void ggml_ext_scale_add_kernel(const char * a, const char * b, char * y, float scale,
                                                 ggml_ext_scale_add_shape shape) {
    const int64_t n_rows = shape.ne[1] * shape.ne[2] * shape.ne[3];
    for (int64_t row = blockIdx.x; row < n_rows; row += gridDim.x) {
        const int64_t i1  = row % shape.ne[1];
        const int64_t i2  = row / shape.ne[1] % shape.ne[2];
        const int64_t i3  = row / (shape.ne[1] * shape.ne[2]);
        const auto    at  = [&](const int64_t * nb) { return i1 * nb[1] + i2 * nb[2] + i3 * nb[3]; };
        const float * a_x = reinterpret_cast<const float *>(a + at(shape.nb_a));
        const float * b_x = reinterpret_cast<const float *>(b + at(shape.nb_b));
        float *       y_x = reinterpret_cast<float *>(y + at(shape.nb_y));
        for (int64_t i = threadIdx.x; i < shape.ne[0]; i += blockDim.x) {
            y_x[i] = scale * a_x[i] + b_x[i];
        }
    }
}
