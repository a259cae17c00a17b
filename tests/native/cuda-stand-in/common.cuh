// Takes the place of upstream's ggml-cuda/common.cuh where cuda/*.cu is compiled for a CPU: the part of it that they use,
// with plain memory as the device's and kernels in the emulator. stand-in.h has the device.

#pragma once

#pragma GCC diagnostic ignored "-Wunused-function"  // in upstream's ggml-impl.h

#include "common/device.cuh"
#include "ggml-impl.h"

#include <cstdlib>
#include <memory>
#include <unordered_map>
#include <vector>

#define USE_CUDA_GRAPH
#define GGML_CUDA_MAX_STREAMS      8
#define GGML_CUDA_CC_DP4A          610
#define GGML_CUDA_CC_TURING        750
#define GGML_CUDA_CC_IS_NVIDIA(cc) ((cc) > 0)

#define CUDA_CHECK(call) GGML_ASSERT((call) == cudaSuccess)

inline cudaError_t cudaMalloc(void ** memory, size_t size) {
    *memory = std::aligned_alloc(256, GGML_PAD(size, 256));
    return *memory ? cudaSuccess : 1;
}
inline cudaError_t cudaFree(void * memory) {
    std::free(memory);
    return cudaSuccess;
}
inline void ggml_cuda_set_device(int) {}

struct ggml_cuda_device_info {
    struct device {
        int    cc;
        int    nsm;
        size_t smpbo;
    } devices[1];
    int compiled;  // architecture that the code was compiled for
};

inline ggml_cuda_device_info & ggml_cuda_info() {
    static ggml_cuda_device_info info = { { { 900, 132, 227 * 1024 } }, 900 };
    return info;
}
inline int ggml_cuda_highest_compiled_arch(int cc) {
    return std::min(cc, ggml_cuda_info().compiled);
}

// What a captured graph is known by.
struct ggml_cuda_graph {
    struct node_properties {
        ggml_tensor node;
        void *      node_src_data_ptrs[GGML_MAX_SRC];
    };

    uint64_t                     uid             = 0;
    bool                         warmup_complete = false;
    bool                         captured        = false;
    std::vector<node_properties> node_props;
};

struct ggml_cuda_stream_context {
    std::vector<int> concurrent_events;
};

struct ggml_cuda_pool {};

struct ggml_backend_cuda_context {
    int device         = 0;
    int curr_stream_no = 0;

    std::unordered_map<const void *, std::unique_ptr<ggml_cuda_graph>> cuda_graphs;

    cudaStream_t               stream() { return nullptr; }
    ggml_cuda_pool &           pool() { return memory; }
    ggml_cuda_stream_context & stream_context() { return streams; }

  private:
    ggml_cuda_pool           memory;
    ggml_cuda_stream_context streams;
};

// Filled with NaN: what a kernel does not write must not count.
template <typename T> class ggml_cuda_pool_alloc {
  public:
    explicit ggml_cuda_pool_alloc(ggml_cuda_pool &) {}

    ggml_cuda_pool_alloc(ggml_cuda_pool &, size_t n) { alloc(n); }

    T * alloc(size_t n) {
        const size_t size = GGML_PAD(n * sizeof(T), 256);
        memory.reset(static_cast<T *>(std::aligned_alloc(256, size)));
        std::memset(static_cast<void *>(memory.get()), 0xff, size);
        return get();
    }

    T * get() { return memory.get(); }

  private:
    struct deleter {
        void operator()(T * p) const { std::free(p); }
    };

    std::unique_ptr<T, deleter> memory;
};
