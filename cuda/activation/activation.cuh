// Activations as int8, the right-hand side of every product with FQ4 or FQ4_64 weights on CUDA.

#pragma once

#include <cstdint>

struct ggml_backend_cuda_context;
struct ggml_tensor;

// Row r of x (r = i1 + ne1 * (i2 + ne2 * i3)) is k = ne0 values in groups of 256 (for FQ4) or 64 (FQ4_64):
//     x[r][i] ~ scales[i / group][r] * codes[r][i], scale = max|x| / 127 of the group, code = rint(x / scale).
// A group of zeros has scale 0; one with a NaN or an Inf has scale NaN.
struct ggml_ext_cuda_activation {
    int8_t * codes;   // [n_rows][k], 16-byte aligned
    float *  scales;  // [k / group][n_rows]
    int64_t  k;
    int64_t  n_rows;
};

// The int8 form of x: F32, nb0 == 4, ne0 a multiple of the group, other strides arbitrary. Quantised on ctx.stream() unless
// this graph has already done so on this stream. Valid for what is launched on ctx.stream() before the next two calls
// of the two functions here.
ggml_ext_cuda_activation ggml_ext_cuda_quantized(ggml_backend_cuda_context & ctx, const ggml_tensor * x, int group);

// Where the caller is about to write, on ctx.stream(), the int8 form of x in groups of 256, which ggml_ext_cuda_quantized then gives.
// codes_only: x itself is not written, so its readers must come, on this stream, before two other tensors are quantised;
// one that comes too late ends the process. Products with FQ4 weights therefore read x through these functions alone.
ggml_ext_cuda_activation ggml_ext_cuda_quantized_reserve(ggml_backend_cuda_context & ctx, const ggml_tensor * x,
                                                         bool codes_only = false);
