// MUL_MAT_ID with many tokens: which columns use which expert, found on the device.

#pragma once

#include "common/device.cuh"
#include "tiles_problem.h"

constexpr int GGML_EXT_FQ4_SORT_THREADS = 256;

// Thread block e finds the pairs p = token n_used + slot whose expert, ids[token ids_stride + slot], is e. They go to
// `pairs` behind those of lower experts, in ascending order. With b pairs of lower experts, tiles b / columns + e and
// following are e's: enough for all of its columns and, for the expert after it, a free place; those it does not need
// get a count of 0, and so do the last ones up to n_tiles.
static __global__ void __launch_bounds__(GGML_EXT_FQ4_SORT_THREADS) ggml_ext_fq4_tiles_sort(
    const int32_t * ids, int64_t ids_stride, int n_tokens, int n_used, int columns, int32_t * pairs,
    ggml_ext_fq4_expert_tile * tiles, int n_tiles) {
    constexpr int  n_warps = GGML_EXT_FQ4_SORT_THREADS / 32;
    __shared__ int own_of_warp[n_warps], lower_of_warp[n_warps];
    const int      expert = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // Each warp has a range of pairs, whole groups of 32.
    const int      n_pairs = n_tokens * n_used;
    const int      length  = (n_pairs + n_warps * 32 - 1) / (n_warps * 32) * 32;
    const int      begin = min(warp * length, n_pairs), end = min(begin + length, n_pairs);
    const auto     expert_of = [&](int p) { return p < end ? ids[p / n_used * ids_stride + p % n_used] : INT32_MAX; };

    int own = 0, lower = 0;
    for (int p = begin; p < end; p += 32) {
        const int other = expert_of(p + lane);
        own += __popc(__ballot_sync(0xffffffffu, other == expert));
        lower += __popc(__ballot_sync(0xffffffffu, other < expert));
    }
    if (lane == 0) {
        own_of_warp[warp]   = own;
        lower_of_warp[warp] = lower;
    }
    __syncthreads();
    int first = 0, n_own = 0, at = 0;
    for (int i = 0; i < n_warps; i++) {
        first += lower_of_warp[i];
        at += i < warp ? own_of_warp[i] : 0;
        n_own += own_of_warp[i];
    }
    at += first;
    for (int p = begin; p < end; p += 32) {
        const unsigned found = __ballot_sync(0xffffffffu, expert_of(p + lane) == expert);
        if (found >> lane & 1) {
            pairs[at + __popc(found & ((1u << lane) - 1))] = p + lane;
        }
        at += __popc(found);
    }

    const int first_tile = first / columns + expert;
    const int last_tile  = expert + 1 == int(gridDim.x) ? n_tiles : (first + n_own) / columns + expert + 1;
    for (int i = first_tile + int(threadIdx.x); i < last_tile; i += blockDim.x) {
        const int done = (i - first_tile) * columns;
        tiles[i]       = { expert, first + done, max(0, min(columns, n_own - done)) };
    }
}
