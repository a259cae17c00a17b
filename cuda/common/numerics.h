// Constants of the kernels' arithmetic.

#ifndef GGML_EXT_CUDA_NUMERICS_H
#define GGML_EXT_CUDA_NUMERICS_H

#include <cstdint>

namespace ggml_ext {

constexpr float log2_e = 1.44269504f;

// 1.5 * 2^23, a float whose last bit is worth 1. An int32 sum that starts from its bits is, read as a float, magic + sum
// for |sum| < 2^22: no conversion. A float that is added to it leaves itself, rounded, in the low bits.
constexpr float   magic      = 12582912.0f;
constexpr int32_t magic_bits = 0x4b400000;

}  // namespace ggml_ext

#endif  // GGML_EXT_CUDA_NUMERICS_H
