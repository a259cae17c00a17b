// Shared memory that a launch needs beyond what every kernel gets.

#ifndef GGML_EXT_CUDA_LAUNCH_H
#define GGML_EXT_CUDA_LAUNCH_H

#include <cuda_runtime.h>

#include <cstddef>
#include <map>
#include <mutex>
#include <utility>

constexpr size_t ggml_ext_cuda_granted_shared = 48 * 1024;  // to every kernel
// From here on it is shared memory that limits the blocks of an SM, under the driver's own choice of how much of it is
// L1 cache.
constexpr size_t ggml_ext_cuda_much_shared    = 24 * 1024;

// Before a launch with so much dynamic shared memory on the current device: asks for the memory, and for all of an SM's
// that can be shared memory. The driver is asked once per kernel, device and larger size.
inline cudaError_t ggml_ext_cuda_ask_shared(const void * kernel, size_t shared_bytes) {
    if (shared_bytes < ggml_ext_cuda_much_shared) {
        return cudaSuccess;
    }
    // Never destroyed: a context may outlive the destructors of static variables.
    static std::mutex & mutex = *new std::mutex;
    static auto &       asked = *new std::map<std::pair<int, const void *>, size_t>;

    int         device = 0;
    cudaError_t error  = cudaGetDevice(&device);
    if (error != cudaSuccess) {
        return error;
    }
    std::lock_guard<std::mutex> lock(mutex);
    size_t &                    before = asked[{ device, kernel }];
    if (shared_bytes <= before) {
        return cudaSuccess;
    }
    if (shared_bytes > ggml_ext_cuda_granted_shared) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    }
    if (error == cudaSuccess) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                     int(cudaSharedmemCarveoutMaxShared));
    }
    before = error == cudaSuccess ? shared_bytes : before;
    return error;
}

#endif  // GGML_EXT_CUDA_LAUNCH_H
