// GGML_EXT_OP_SAMPLE, device code: one block per row. Masses are integers, so sums have no order, and the block gives
// the tokens of the reference (sample/cpu/sample.cpp) with any number of threads.

#pragma once

#include "search.cuh"

namespace ggml_ext {

// Mass of a candidate in the draw.
__device__ __forceinline__ uint64_t sample_drawn(float logit, int id, uint64_t cut, float max, float inverse) {
    const uint32_t key = ggml_ext_sample_key(logit);
    if (key < uint32_t(cut >> 32) || ggml_ext_sample_place(key, uint32_t(id)) < cut) {
        return 0;
    }
    return ggml_ext_sample_mass((logit - max) * inverse);
}

// The first candidate, in ascending order of ids, at which the sum is above uniform * total: first the warp whose part
// has it, then the thread among all that share this part.
__device__ __forceinline__ void sample_draw(const sample_state & s, uint64_t cut, float inverse, uint64_t uniform,
                                            const int32_t * ids, int32_t * token) {
    sample_memory & m    = *s.memory;
    uint64_t        part = 0;
    sample_pass<4>(s.row, s.n, [&](float logit, int id) { part += sample_drawn(logit, id, cut, s.max, inverse); });
    part = warp_sum(part);
    if (threadIdx.x % 32 == 0) {
        m.warp_part[0][threadIdx.x / 32] = part;
    }
    __syncthreads();
    const int n_warps = int(blockDim.x) / 32;
    uint64_t  total   = 0;
    for (int i = 0; i < n_warps; i++) {
        total += m.warp_part[0][i];
    }
    uint64_t left = ggml_ext_sample_scaled(uniform, total);
    int      warp = 0;
    while (m.warp_part[0][warp] <= left) {
        left -= m.warp_part[0][warp++];
    }

    const int         offset = sample_offset(s.row);
    const sample_part in     = sample_part_of(warp, s.n + offset, n_warps);
    const int         each   = (in.to - in.from + int(blockDim.x) - 1) / int(blockDim.x);
    const int         from   = max(in.from + int(threadIdx.x) * each, offset) - offset;
    const int         to     = min(in.from + int(threadIdx.x + 1) * each, in.to) - offset;
    part                     = 0;
    for (int id = from; id < to; id++) {
        part += sample_drawn(s.row[id], id, cut, s.max, inverse);
    }
    uint64_t all;
    uint64_t before = sample_scan(part, m.warp_part[1], &all);
    if (before <= left && left < before + part) {
        int id = from;
        for (uint64_t mass; before + (mass = sample_drawn(s.row[id], id, cut, s.max, inverse)) <= left; id++) {
            before += mass;
        }
        *token = ids ? ids[id] : id;
    }
}

// The best candidate, how many there are and the lowest key; false where a logit is NaN or +Inf, or none is finite.
struct sample_extent {
    uint64_t best;
    uint32_t lowest;
    int      n;
};

__device__ __forceinline__ bool sample_measure(const float * row, int n_vocab, sample_memory & m, sample_extent * e) {
    uint64_t best = 0, n = 0;
    uint32_t lowest = ~uint32_t(0);
    bool     wrong  = false;
    sample_pass<4>(row, n_vocab, [&](float logit, int id) {
        const uint32_t key = ggml_ext_sample_key(logit);
        wrong              = wrong || ggml_ext_sample_wrong(key);
        if (key > ggml_ext_sample_key_nothing) {
            best   = max(best, ggml_ext_sample_place(key, uint32_t(id)));
            lowest = min(lowest, key);
            n++;
        }
    });
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        best   = max(best, __shfl_xor_sync(0xffffffffu, best, step));
        lowest = min(lowest, __shfl_xor_sync(0xffffffffu, lowest, step));
    }
    if (threadIdx.x % 32 == 0) {
        m.warp_part[0][threadIdx.x / 32] = best;
        m.warp_part[1][threadIdx.x / 32] = lowest;
    }
    wrong = __syncthreads_or(wrong);
    for (int i = 0; i < int(blockDim.x) / 32; i++) {
        best   = max(best, m.warp_part[0][i]);
        lowest = min(lowest, uint32_t(m.warp_part[1][i]));
    }
    __syncthreads();
    sample_scan(n, m.warp_part[0], &n);
    __syncthreads();
    *e = { best, lowest, int(n) };
    return !wrong && n > 0;
}

}  // namespace ggml_ext

// Row blockIdx.x. blockDim.x is a power of two from 32 to sample_max_threads.
static __global__ void __launch_bounds__(ggml_ext::sample_max_threads, 1) ggml_ext_sample_kernel(
    const ggml_ext::sample_batch batch) {
    using namespace ggml_ext;
    __shared__ sample_memory memory;
    const sample_row         row = batch.rows[blockIdx.x];
    ggml_ext_sample_params   p;
    int32_t                  words[GGML_EXT_SAMPLE_WORDS];
#pragma unroll
    for (int i = 0; i < GGML_EXT_SAMPLE_WORDS; i++) {
        words[i] = row.parameters[i];
    }
    memcpy(&p, words, sizeof(p));

    sample_extent e;
    const bool    usable  = sample_measure(row.logits, batch.n_vocab, memory, &e);
    const float   inverse = ggml_ext_sample_inverse(p.temperature);
    if (!usable || inverse == 0) {
        if (threadIdx.x == 0) {
            const int32_t id = ggml_ext_sample_id(e.best);
            *row.token       = !usable ? -1 : row.ids ? row.ids[id] : id;
        }
        return;
    }
    const float  max   = ggml_ext_sample_logit(uint32_t(e.best >> 32));
    // Masses end 28 below the maximum; what is lower shares the last bucket.
    const float  range = fminf(max - ggml_ext_sample_logit(e.lowest), 28.0f);
    sample_state s     = { row.logits, batch.n_vocab, p.top_p < 1, max, range > 1e-30f ? sample_buckets / range : 0.0f,
                           false,      &memory };
    sample_draw(s, sample_find_cut(s, p, e.best, e.n), inverse, p.uniform, row.ids, row.token);
}
