// GGML_EXT_OP_SAMPLE, device code: a block's memory, its passes over a row of logits, and sums over its threads.

#pragma once

#include "common/device.cuh"
#include "sample/sample_math.h"

namespace ggml_ext {

constexpr int sample_max_threads = 512;
constexpr int sample_max_warps   = sample_max_threads / 32;
constexpr int sample_buckets     = 1024;
constexpr int sample_list        = 1024;
constexpr int sample_rows        = 64;  // per launch

struct sample_row {
    const float *   logits;
    const int32_t * parameters;
    const int32_t * ids;  // or null
    int32_t *       token;
};

// The rows of a launch, in the kernel's arguments.
struct sample_batch {
    sample_row rows[sample_rows];
    int32_t    n_vocab;
};

struct sample_memory {
    unsigned mass_low[sample_buckets], mass_high[sample_buckets];
    unsigned count[sample_buckets];
    uint64_t place[sample_list];
    uint64_t listed_mass[sample_list];
    uint64_t warp_part[2][sample_max_warps];
    unsigned n_listed;
    // The bucket or candidate at which a sum reaches its target, and the sums before it.
    unsigned found;
    uint64_t found_count, found_mass;
    uint64_t found_place;
};

// The part of a row that a warp walks: [from, to) in positions, which are ids plus the offset of the row's first float
// in its 16 bytes. from is a multiple of 128.
struct sample_part {
    int from, to;
};

__device__ __forceinline__ int sample_offset(const float * row) {
    return int(reinterpret_cast<uintptr_t>(row) / sizeof(float) % 4);
}

__device__ __forceinline__ sample_part sample_part_of(int warp, int n_positions, int n_warps) {
    const int size = ((n_positions + n_warps - 1) / n_warps + 127) / 128 * 128;
    const int from = min(warp * size, n_positions);
    return { from, min(from + size, n_positions) };
}

// Four positions from an aligned one on; -Inf outside the row.
__device__ __forceinline__ float4 sample_load(const float * row, int offset, int n, int position) {
    const int id = position - offset;
    if (id >= 0 && id + 4 <= n) {
        return *reinterpret_cast<const float4 *>(row + id);
    }
    const auto at = [&](int i) { return i >= 0 && i < n ? row[i] : -INFINITY; };
    return make_float4(at(id), at(id + 1), at(id + 2), at(id + 3));
}

// use(logit, id) for this thread's share of the row, with LOADS loads under way; -Inf is passed on, also for ids outside.
template <int LOADS, typename F> __device__ __forceinline__ void sample_pass(const float * row, int n, F use) {
    const int         offset = sample_offset(row);
    const sample_part part   = sample_part_of(int(threadIdx.x) / 32, n + offset, int(blockDim.x) / 32);
    for (int from = part.from + 4 * (int(threadIdx.x) % 32); from < part.to; from += 128 * LOADS) {
        float4 x[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            const int position = from + 128 * i;
            x[i]               = sample_load(row, offset, position < part.to ? n : 0, position);
        }
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            const int id = from + 128 * i - offset;
            use(x[i].x, id);
            use(x[i].y, id + 1);
            use(x[i].z, id + 2);
            use(x[i].w, id + 3);
        }
    }
}

// Sum of `value` over the threads before this one; *total: over all. Contains a barrier. part: one of warp_part that no
// thread reads any more; all have read it after the next barrier.
__device__ __forceinline__ uint64_t sample_scan(uint64_t value, uint64_t * part, uint64_t * total) {
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, n_warps = int(blockDim.x) / 32;
    uint64_t  sum = value;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const uint64_t left = __shfl_up_sync(0xffffffffu, sum, unsigned(step));
        sum += lane >= step ? left : 0;
    }
    if (lane == 31) {
        part[warp] = sum;
    }
    __syncthreads();
    uint64_t before = 0, all = 0;
    for (int i = 0; i < n_warps; i++) {
        before += i < warp ? part[i] : 0;
        all += part[i];
    }
    *total = all;
    return before + sum - value;
}

}  // namespace ggml_ext
