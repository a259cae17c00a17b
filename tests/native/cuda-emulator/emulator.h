// Runs CUDA kernels of ours on a CPU, for tests: cuda/common/device.cuh includes this in place of CUDA's headers where
// GGML_EXT_CUDA_EMULATED is defined. Every thread of a block is a fiber; blocks run one after the other.
//
// What it finds: wrong indices and fragments, accesses outside a buffer (under the address sanitizer), barriers and
// warp operations that not all named threads reach (it ends the process and says which), a missing __syncthreads (one
// warp, chosen by chance, runs ahead of the others for a while) or __syncwarp (each thread runs alone up to its next
// one, in an order that changes), cp_async whose data is read before its wait or whose destination is still in use
// (poison from the copy on, the data from the wait on), dynamic shared memory that is read before it is written (poison).
// What it cannot find: anything about speed, memory order between blocks, registers, the flush of denormals and the
// approximate division of -use_fast_math, reads of static __shared__ variables before they are written (these keep the
// last block's values), and PTX that says something else than its wrapper's comment.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__   static
#define __align__(n) __attribute__((aligned(n)))
#ifndef __restrict__
#    define __restrict__ __restrict
#endif

// Tests may set it to run the paths of older architectures.
#ifndef GGML_EXT_CUDA_ARCH
#    define GGML_EXT_CUDA_ARCH 900
#endif

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define GGML_EXT_EMULATED_VECTOR(type, name)                        \
    struct alignas(2 * sizeof(type)) name##2 {                      \
        type x, y;                                                  \
    };                                                              \
    struct name##3 {                                                \
        type x, y, z;                                               \
    };                                                              \
    struct alignas(4 * sizeof(type)) name##4 {                      \
        type x, y, z, w;                                            \
    };                                                              \
    inline name##2 make_##name##2(type x, type y) {                 \
        return { x, y };                                            \
    }                                                               \
    inline name##4 make_##name##4(type x, type y, type z, type w) { \
        return { x, y, z, w };                                      \
    }
GGML_EXT_EMULATED_VECTOR(int, int)
GGML_EXT_EMULATED_VECTOR(float, float)
#undef GGML_EXT_EMULATED_VECTOR
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) {
    return { x, y };
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return { x, y, z, w };
}

namespace ggml_ext_emulator {

// Of the running thread. gridDim and blockDim are the launch's.
extern uint3 thread_idx, block_idx;
extern dim3  block_dim, grid_dim;

// Runs body once per thread of every block of the grid.
void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()> & body);

// Order in which threads run between barriers; changes with every launch, and starts from here.
void seed(uint32_t value);

char * dynamic_shared();

// Waits for all threads of the block that have not returned; gives the sum of `value` over them.
int block_barrier(int value);

// All lanes of mask leave `size` bytes and get everybody's, lane l's at l * size of the result, which is valid until the
// thread's next call. The lanes must agree on mask and size.
constexpr size_t exchange_limit = 64;
const char *     exchange(unsigned mask, const void * mine, size_t size);

[[noreturn]] void fail(const char * what);

template <typename T> struct exchanged {
    const char * parts;

    T operator[](unsigned lane) const {
        T value;
        std::memcpy(&value, parts + lane * sizeof(T), sizeof(T));
        return value;
    }
};

template <typename T> exchanged<T> share(unsigned mask, const T & mine) {
    static_assert(sizeof(T) <= exchange_limit, "a lane's part is too large");
    return { exchange(mask, &mine, sizeof(T)) };
}

unsigned lane();

void async_copy(void * to, const void * from, size_t size, bool valid);
void async_commit();
void async_wait(int pending);

// Of the running thread: grid_dependency_wait.
void wait_for_grid();
bool has_waited();

}  // namespace ggml_ext_emulator

#define threadIdx ggml_ext_emulator::thread_idx
#define blockIdx  ggml_ext_emulator::block_idx
#define blockDim  ggml_ext_emulator::block_dim
#define gridDim   ggml_ext_emulator::grid_dim

#define GGML_EXT_DYNAMIC_SHARED(type, name) \
    type * const name = reinterpret_cast<type *>(ggml_ext_emulator::dynamic_shared())

using cudaError_t                 = int;
using cudaStream_t                = void *;
constexpr cudaError_t cudaSuccess = 0;

// cuda/common/launch.cuh
template <typename... Params, typename... Args>
cudaError_t ggml_ext_cuda_launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                                 Args... args) {
    ggml_ext_emulator::run(grid, block, shared_bytes, [&] { kernel(static_cast<Params>(args)...); });
    return cudaSuccess;
}

template <typename... Params, typename... Args>
cudaError_t ggml_ext_cuda_launch_overlapped(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                                            cudaStream_t, Args... args) {
    ggml_ext_emulator::run(grid, block, shared_bytes, [&] {
        kernel(static_cast<Params>(args)...);
        if (!ggml_ext_emulator::has_waited()) {
            ggml_ext_emulator::fail("a kernel that was launched early ends without grid_dependency_wait");
        }
    });
    return cudaSuccess;
}

#include "emulator-float16.h"
#include "emulator-functions.h"
#include "emulator-ptx.h"
