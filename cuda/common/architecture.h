// What kernels may use on a device: what they were compiled for, which a device's own capability may exceed (PTX of an
// older architecture that the driver compiles for a newer device lacks the newer instructions).

#ifndef GGML_EXT_CUDA_ARCHITECTURE_H
#define GGML_EXT_CUDA_ARCHITECTURE_H

#include "common.cuh"

// Dot products of four 8-bit integers: sm_61.
inline bool ggml_ext_cuda_has_dp4a(int device) {
    const int cc = ggml_cuda_info().devices[device].cc;
    return GGML_CUDA_CC_IS_NVIDIA(cc) && ggml_cuda_highest_compiled_arch(cc) >= GGML_CUDA_CC_DP4A;
}

// mma of f16 and of 8-bit integers, ldmatrix: sm_75.
inline bool ggml_ext_cuda_has_tensor_cores(int device) {
    const int cc = ggml_cuda_info().devices[device].cc;
    return GGML_CUDA_CC_IS_NVIDIA(cc) && ggml_cuda_highest_compiled_arch(cc) >= GGML_CUDA_CC_TURING;
}

#endif  // GGML_EXT_CUDA_ARCHITECTURE_H
