// How kernels of ours are launched, with all that a launch asks the driver for. device.cuh includes this.

#ifndef GGML_EXT_CUDA_LAUNCH_CUH
#define GGML_EXT_CUDA_LAUNCH_CUH

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdlib>
#include <map>
#include <mutex>
#include <utility>

namespace ggml_ext {

constexpr size_t launch_granted_shared = 48 * 1024;  // to every kernel
// From here on it is shared memory that limits the blocks of an SM, under the driver's own choice of how much of it is
// L1 cache.
constexpr size_t launch_much_shared    = 24 * 1024;

// What is known of a kernel on a device.
struct launch_record {
    size_t shared_bytes = 0;      // asked for so far
    bool   has_waits    = false;
    bool   has_looked   = false;  // whether has_waits is known
};

// Asks for so much dynamic shared memory, and for all of an SM's memory that can be shared.
inline cudaError_t launch_ask_shared(launch_record & record, const void * kernel, size_t shared_bytes) {
    if (shared_bytes < launch_much_shared || shared_bytes <= record.shared_bytes) {
        return cudaSuccess;
    }
    cudaError_t error = cudaSuccess;
    if (shared_bytes > launch_granted_shared) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    }
    if (error == cudaSuccess) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                     int(cudaSharedmemCarveoutMaxShared));
    }
    record.shared_bytes = error == cudaSuccess ? shared_bytes : record.shared_bytes;
    return error;
}

// Whether the kernel's code has the waits of device.cuh: that of architectures before sm_90 has none, also where a driver
// compiles it for a newer device. GGML_CUDA_PDL=0 switches overlapping off, as for llama.cpp's kernels.
inline cudaError_t launch_look_for_waits(launch_record & record, const void * kernel) {
    if (record.has_looked) {
        return cudaSuccess;
    }
    const char *       wanted     = std::getenv("GGML_CUDA_PDL");
    cudaFuncAttributes attributes = {};
    const cudaError_t  error      = cudaFuncGetAttributes(&attributes, kernel);
    record.has_waits  = error == cudaSuccess && attributes.ptxVersion >= 90 && (!wanted || std::atoi(wanted));
    record.has_looked = error == cudaSuccess;
    return error;
}

// Before a launch on the current device. Asks the driver once per kernel, device and larger size.
inline cudaError_t launch_prepare(const void * kernel, size_t shared_bytes, bool & overlaps) {
    if (shared_bytes < launch_much_shared && !overlaps) {
        return cudaSuccess;
    }
    // Never destroyed: a context may outlive the destructors of static variables.
    static std::mutex & mutex = *new std::mutex;
    static auto &       known = *new std::map<std::pair<int, const void *>, launch_record>;

    int         device = 0;
    cudaError_t error  = cudaGetDevice(&device);
    if (error != cudaSuccess) {
        return error;
    }
    std::lock_guard<std::mutex> lock(mutex);
    launch_record &             record = known[{ device, kernel }];
    error                              = launch_ask_shared(record, kernel, shared_bytes);
    if (error == cudaSuccess && overlaps) {
        error    = launch_look_for_waits(record, kernel);
        overlaps = record.has_waits;
    }
    return error;
}

template <typename... Params, typename... Args>
cudaError_t launch_kernel(bool overlaps, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                          cudaStream_t stream, Args... args) {
    const cudaError_t error = launch_prepare((const void *) kernel, shared_bytes, overlaps);
    if (error != cudaSuccess) {
        return error;
    }
#if CUDART_VERSION >= 12030
    if (overlaps) {
        cudaLaunchAttribute attribute                        = {};
        attribute.id                                         = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t config                            = {};
        config.gridDim                                       = grid;
        config.blockDim                                      = block;
        config.dynamicSmemBytes                              = shared_bytes;
        config.stream                                        = stream;
        config.attrs                                         = &attribute;
        config.numAttrs                                      = 1;
        return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
    }
#endif
    kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Params>(args)...);
    return cudaGetLastError();
}

}  // namespace ggml_ext

// Launches kernel<<<grid, block, shared_bytes, stream>>>(args...), which starts when the stream's kernel before it is
// done. Returns the launch's error.
template <typename... Params, typename... Args>
cudaError_t ggml_ext_cuda_launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                                 cudaStream_t stream, Args... args) {
    return ggml_ext::launch_kernel(false, kernel, grid, block, shared_bytes, stream, args...);
}

// The same for a kernel each of whose threads calls grid_dependency_wait before it reads what a kernel before it writes,
// and before it writes anything: from sm_90 on it may start while the one before it still runs.
template <typename... Params, typename... Args>
cudaError_t ggml_ext_cuda_launch_overlapped(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                                            cudaStream_t stream, Args... args) {
    return ggml_ext::launch_kernel(true, kernel, grid, block, shared_bytes, stream, args...);
}

#endif  // GGML_EXT_CUDA_LAUNCH_CUH
