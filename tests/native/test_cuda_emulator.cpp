// The CUDA emulator itself: threads, barriers, warps, asynchronous copies. Values of single functions are in
// test_cuda_emulator_values.cpp, kernels that it must stop in test_cuda_emulator_stops.cpp.

#include "check.h"
#include "common/device.cuh"

#include <cstring>
#include <vector>

namespace {

const unsigned n_seeds = 8;

// --- threads and blocks ---

__global__ void index_kernel(int * seen, int * blocks) {
    const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    const unsigned block  = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    atomicAdd(&seen[block * blockDim.x * blockDim.y * blockDim.z + thread], 1);
    if (thread == 0) {
        blocks[block] += 1;
    }
}

void check_indices() {
    const dim3       grid(3, 2, 4), block(5, 7, 2);
    std::vector<int> seen(24 * 70), blocks(24);
    ggml_ext_cuda_launch(index_kernel, grid, block, 0, nullptr, seen.data(), blocks.data());
    for (size_t i = 0; i < seen.size(); i++) {
        CHECK(seen[i] == 1, "thread %zu ran %d times", i, seen[i]);
    }
    for (size_t i = 0; i < blocks.size(); i++) {
        CHECK(blocks[i] == 1, "block %zu ran %d times", i, blocks[i]);
    }
}

constexpr int n_phases = 8;

// The thread that runs first after each barrier.
__global__ void order_kernel(int * n_arrived, int * first) {
    for (int phase = 0; phase < n_phases; phase++) {
        if (atomicAdd(&n_arrived[phase], 1) == 0) {
            first[phase] = int(threadIdx.x);
        }
        __syncthreads();
    }
}

// An order that stayed the same would hide races that only another order shows.
void check_order() {
    int n_arrived[n_phases] = {}, first[n_phases];
    ggml_ext_cuda_launch(order_kernel, dim3(1), dim3(96), 0, nullptr, n_arrived, first);
    int n_others = 0;
    for (int phase = 1; phase < n_phases; phase++) {
        n_others += first[phase] != first[0];
    }
    CHECK(n_others >= n_phases / 2, "the same thread comes first after %d barriers", n_phases - 1 - n_others);
}

// --- barriers ---

// Reverses the threads' numbers through shared memory; without the barrier some thread reads too early.
template <bool BARRIER> __global__ void reverse_kernel(int * y) {
    GGML_EXT_DYNAMIC_SHARED(int, shared);
    shared[threadIdx.x] = int(threadIdx.x);
    if (BARRIER) {
        __syncthreads();
    }
    y[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

// The same in a warp.
template <bool BARRIER> __global__ void reverse_warp_kernel(int * y) {
    GGML_EXT_DYNAMIC_SHARED(int, shared);
    shared[threadIdx.x] = int(threadIdx.x);
    if (BARRIER) {
        __syncwarp();
    }
    y[threadIdx.x] = shared[threadIdx.x ^ 31];
}

// Shared memory is used twice; without the second barrier a fast thread overwrites what a slow one has yet to read.
template <bool BARRIER> __global__ void reuse_kernel(int * y) {
    GGML_EXT_DYNAMIC_SHARED(int, shared);
    int sum = 0;
    for (int round = 0; round < 2; round++) {
        shared[threadIdx.x] = int(threadIdx.x) + round;
        __syncthreads();
        sum += shared[blockDim.x - 1 - threadIdx.x];
        if (BARRIER) {
            __syncthreads();
        }
    }
    y[threadIdx.x] = sum;
}

// Number of seeds at which the kernel's y differs from factor * (n - 1 - i) + offset (partner = i ^ 31: within warps).
int n_wrong(void (*kernel)(int *), int factor, int offset, bool in_warps) {
    const int n     = 96;
    int       wrong = 0;
    for (unsigned seed = 0; seed < n_seeds; seed++) {
        ggml_ext_emulator::seed(seed);
        std::vector<int> y(n);
        ggml_ext_cuda_launch(kernel, dim3(1), dim3(n), n * sizeof(int), nullptr, y.data());
        bool same = true;
        for (int i = 0; i < n; i++) {
            same &= y[i] == factor * (in_warps ? i ^ 31 : n - 1 - i) + offset;
        }
        wrong += !same;
    }
    return wrong;
}

void check_barriers() {
    CHECK(n_wrong(reverse_kernel<true>, 1, 0, false) == 0, "with __syncthreads");
    CHECK(n_wrong(reverse_kernel<false>, 1, 0, false) == int(n_seeds), "a missing __syncthreads is not seen");
    CHECK(n_wrong(reverse_warp_kernel<true>, 1, 0, true) == 0, "with __syncwarp");
    CHECK(n_wrong(reverse_warp_kernel<false>, 1, 0, true) == int(n_seeds), "a missing __syncwarp is not seen");
    CHECK(n_wrong(reuse_kernel<true>, 2, 1, false) == 0, "with both barriers");
    CHECK(n_wrong(reuse_kernel<false>, 2, 1, false) == int(n_seeds), "a missing second barrier is not seen");
}

// Threads that have returned no longer count, neither waiting nor as votes.
__global__ void vote_kernel(int * y) {
    if (threadIdx.x % 5 == 4) {
        return;
    }
    y[2 * threadIdx.x]     = __syncthreads_or(threadIdx.x == 74 || threadIdx.x == 1000);
    y[2 * threadIdx.x + 1] = __syncthreads_or(threadIdx.x == 70);
}

void check_votes() {
    const int        n = 100;
    std::vector<int> y(2 * n, -1);
    ggml_ext_cuda_launch(vote_kernel, dim3(1), dim3(n), 0, nullptr, y.data());
    for (int i = 0; i < n; i++) {
        const bool left = i % 5 == 4;
        CHECK(y[2 * i] == (left ? -1 : 0) && y[2 * i + 1] == (left ? -1 : 1), "or of thread %d", i);
    }
}

// --- shared memory ---

__global__ void fresh_kernel(int * n_stale, int * n_misaligned) {
    GGML_EXT_DYNAMIC_SHARED(unsigned, shared);
    n_stale[blockIdx.x] += shared[threadIdx.x] != 0xffffffffu;
    n_misaligned[blockIdx.x] += uintptr_t(shared) % 128 != 0;
    shared[threadIdx.x] = 1;
}

void check_shared_memory() {
    int n_stale[3] = {}, n_misaligned[3] = {};
    ggml_ext_cuda_launch(fresh_kernel, dim3(3), dim3(64), 64 * 4, nullptr, n_stale, n_misaligned);
    for (int i = 0; i < 3; i++) {
        CHECK(n_stale[i] == 0 && n_misaligned[i] == 0, "block %d: %d stale, %d misaligned", i, n_stale[i],
              n_misaligned[i]);
    }
}

// --- warps ---

// PTX ISA, "shfl": what lane gets, by the pseudo code there; c as CUDA's functions build it from the width.
enum shuffle { SHUFFLE_IDX, SHUFFLE_UP, SHUFFLE_XOR };

int ptx_source(shuffle mode, int lane, int b, int width) {
    const int segment  = 32 - width;
    const int clamp    = mode == SHUFFLE_UP ? 0 : 31;
    const int min_lane = lane & segment, max_lane = min_lane | (clamp & ~segment);
    switch (mode) {
        case SHUFFLE_UP:
            return lane - b >= max_lane ? lane - b : lane;
        case SHUFFLE_XOR:
            return (lane ^ b) <= max_lane ? lane ^ b : lane;
        default:
            return min_lane | (b & 31 & ~segment);
    }
}

__global__ void shuffle_kernel(int * y, int b, int width) {
    const int lane   = int(threadIdx.x);
    y[lane]          = __shfl_sync(0xffffffffu, lane, b, width);
    y[32 + lane]     = __shfl_up_sync(0xffffffffu, lane, b, width);
    y[2 * 32 + lane] = __shfl_xor_sync(0xffffffffu, lane, b, width);
}

void check_shuffles() {
    for (int width = 1; width <= 32; width *= 2) {
        for (int b = 0; b < 32; b++) {
            int y[3 * 32];
            ggml_ext_cuda_launch(shuffle_kernel, dim3(1), dim3(32), 0, nullptr, y, b, width);
            for (int i = 0; i < 3 * 32; i++) {
                CHECK(y[i] == ptx_source(shuffle(i / 32), i % 32, b, width), "shuffle %d of lane %d, b %d, width %d",
                      i / 32, i % 32, b, width);
            }
        }
    }
}

// Votes and shuffles of a part of the warp, the others having left it; and the reductions of device.cuh.
__global__ void part_kernel(unsigned * y, int * sums, float * maxima) {
    const unsigned lane = threadIdx.x % 32;
    sums[threadIdx.x]   = ggml_ext::warp_sum(int(threadIdx.x)) + 10000 * ggml_ext::warp_sum<8>(int(lane));
    maxima[threadIdx.x] = ggml_ext::warp_max<16>(-float(threadIdx.x));
    if (lane >= 12) {
        return;
    }
    y[3 * threadIdx.x]     = __ballot_sync(0xfffu, lane % 3 == 0);
    y[3 * threadIdx.x + 1] = __any_sync(0xfffu, lane == 11);
    y[3 * threadIdx.x + 2] = __shfl_sync(0xfffu, threadIdx.x, 11);
}

void check_part_of_a_warp() {
    unsigned y[3 * 64];
    int      sums[64];
    float    maxima[64];
    ggml_ext_cuda_launch(part_kernel, dim3(1), dim3(64), 0, nullptr, y, sums, maxima);
    for (int i = 0; i < 64; i++) {
        const int first = i / 8 * 8 % 32;
        CHECK(sums[i] == 496 + i / 32 * 1024 + 10000 * (8 * first + 28), "sums of thread %d: %d", i, sums[i]);
        CHECK(maxima[i] == -float(i / 16 * 16), "maximum of thread %d: %g", i, maxima[i]);
        if (i % 32 < 12) {
            CHECK(y[3 * i] == 0x249 && y[3 * i + 1] == 1, "votes of thread %d", i);
            CHECK(y[3 * i + 2] == unsigned(i / 32 * 32 + 11), "shuffle of thread %d", i);
        }
    }
}

__global__ void atomics_kernel(int * max, float * sum) {
    atomicAdd(sum, 0.5f);
    atomicMax(max, int(threadIdx.x + blockIdx.x));
}

void check_atomics() {
    int   max = -1;
    float sum = 0;
    ggml_ext_cuda_launch(atomics_kernel, dim3(3), dim3(40), 0, nullptr, &max, &sum);
    CHECK(sum == 60 && max == 41, "sum %g, max %d", sum, max);
}

// --- asynchronous copies ---

// Thread 0 copies 4, 4, 16 and 16 bytes in four groups, the last without reading, and says after each wait how many
// bytes have arrived in all.
__global__ void copy_kernel(const unsigned char * from, unsigned char * bytes, int * arrived) {
    const auto count = [&](int after) {
        int n = 0;
        for (int i = 0; i < 64; i++) {
            n += bytes[i] != 0xff;
        }
        arrived[after] = n;
    };
    ggml_ext::cp_async<4>(bytes + 28, from);
    ggml_ext::cp_async_commit();
    ggml_ext::cp_async<4>(bytes + 32, from + 8);
    ggml_ext::cp_async_commit();
    ggml_ext::cp_async<16>(bytes, from + 16);
    ggml_ext::cp_async_commit();
    ggml_ext::cp_async_part(bytes + 48, from, 0);
    count(0);
    ggml_ext::cp_async_wait<3>();
    count(1);
    ggml_ext::cp_async_wait<2>();
    count(2);
    ggml_ext::cp_async_wait<1>();
    count(3);
    ggml_ext::cp_async_wait<0>();
    count(4);  // the last group is not committed yet
    ggml_ext::cp_async_commit();
    ggml_ext::cp_async_wait<0>();
    count(5);
}

void check_copies() {
    alignas(16) unsigned char from[32], bytes[64] = {};  // zeros: poison must come from the copies
    for (int i = 0; i < 32; i++) {
        from[i] = (unsigned char) i;
    }
    std::memset(bytes + 16, 0xff, 12);
    std::memset(bytes + 36, 0xff, 12);
    int arrived[6];
    ggml_ext_cuda_launch(copy_kernel, dim3(1), dim3(1), 0, nullptr, from, bytes, arrived);
    const int expected[6] = { 0, 0, 4, 8, 24, 40 };
    for (int i = 0; i < 6; i++) {
        CHECK(arrived[i] == expected[i], "%d bytes at step %d", arrived[i], i);
    }
    CHECK(!std::memcmp(bytes + 28, from, 4) && !std::memcmp(bytes + 32, from + 8, 4) &&
              !std::memcmp(bytes, from + 16, 16),
          "what was copied");
    CHECK(std::all_of(bytes + 48, bytes + 64, [](unsigned char byte) { return byte == 0; }),
          "zeros where nothing is read");
}

}  // namespace

int main() {
    check_indices();
    check_order();
    check_barriers();
    check_votes();
    check_shared_memory();
    check_shuffles();
    check_part_of_a_warp();
    check_atomics();
    check_copies();
    return check_done();
}
