// GGML_EXT_OP_SAMPLE, device code: which candidates are kept.
//
// The end of a prefix (of a count or of a mass) is looked for in windows, ranges of places: a histogram of the window
// says in which bucket the end lies, and that bucket is the next window, until it has few candidates. These are listed
// in shared memory, and each adds up those before it.

#pragma once

#include "pass.cuh"

namespace ggml_ext {

// What is the same for a whole row.
struct sample_state {
    const float *   row;
    int             n;
    bool            with_mass;  // top-p needs the masses in the histograms
    float           max;
    float           per_logit;  // buckets of the first histogram
    bool            first_histogram_valid;
    sample_memory * memory;
};

// A range of places, both ends included. The first window, which has all candidates, has buckets by logit.
struct sample_window {
    uint64_t low, high;
    int      shift;  // of high - place, to a bucket; < 0: the first window
};

__device__ __forceinline__ int sample_first_bucket(const sample_state & s, float logit) {
    return int(fminf((s.max - logit) * s.per_logit, float(sample_buckets - 1)));
}

// Two atomic additions with a carry: one of 64 bits would be a loop in shared memory.
__device__ __forceinline__ void sample_add(sample_memory & m, int bucket, uint64_t mass) {
    const unsigned low = unsigned(mass);
    if (low > 0) {
        const unsigned before = atomicAdd(&m.mass_low[bucket], low);
        mass += before > ~low ? uint64_t(1) << 32 : 0;
    }
    if (mass >> 32 > 0) {
        atomicAdd(&m.mass_high[bucket], unsigned(mass >> 32));
    }
}

__device__ __forceinline__ uint64_t sample_mass_of(const sample_memory & m, int bucket) {
    return uint64_t(m.mass_high[bucket]) << 32 | m.mass_low[bucket];
}

// FIRST: of the first window, which needs no places.
template <bool FIRST>
__device__ __forceinline__ void sample_histogram(const sample_state & s, const sample_window & w) {
    sample_memory & m = *s.memory;
    for (int i = int(threadIdx.x); i < sample_buckets; i += int(blockDim.x)) {
        m.mass_low[i] = m.mass_high[i] = m.count[i] = 0;
    }
    __syncthreads();
    sample_pass<FIRST ? 4 : 1>(s.row, s.n, [&](float logit, int id) {
        int bucket = 0;
        if (FIRST) {
            if (logit == -INFINITY) {
                return;
            }
            bucket = sample_first_bucket(s, logit);
        } else {
            const uint64_t place = ggml_ext_sample_place(ggml_ext_sample_key(logit), uint32_t(id));
            if (logit == -INFINITY || place < w.low || place > w.high) {
                return;
            }
            bucket = int((w.high - place) >> w.shift);
        }
        atomicAdd(&m.count[bucket], 1u);
        if (s.with_mass) {
            sample_add(m, bucket, ggml_ext_sample_mass(logit - s.max));
        }
    });
    __syncthreads();
}

// The bucket at which the count or the mass, from the sums before the window on, reaches the target; leaves it and the
// sums before it in found, found_count and found_mass.
__device__ __forceinline__ void sample_find_bucket(sample_memory & m, bool by_mass, uint64_t target, uint64_t count,
                                                   uint64_t mass) {
    const int each      = sample_buckets / int(blockDim.x);
    const int first     = int(threadIdx.x) * each;
    uint64_t  own_count = 0, own_mass = 0, all;
    for (int i = first; i < first + each; i++) {
        own_count += m.count[i];
        own_mass += sample_mass_of(m, i);
    }
    count += sample_scan(own_count, m.warp_part[0], &all);
    mass += sample_scan(own_mass, m.warp_part[1], &all);
    for (int i = first; i < first + each; i++) {
        const uint64_t before = by_mass ? mass : count;
        if (before < target && target <= before + (by_mass ? sample_mass_of(m, i) : m.count[i])) {
            m.found       = unsigned(i);
            m.found_count = count;
            m.found_mass  = mass;
        }
        count += m.count[i];
        mass += sample_mass_of(m, i);
    }
    __syncthreads();
}

// The lowest key whose logit is in one of the buckets 0 .. bucket of the first histogram; the bucket does not rise with
// the logit.
__device__ __forceinline__ uint32_t sample_lowest_key(const sample_state & s, int bucket) {
    uint32_t low = ggml_ext_sample_key_nothing, high = ggml_ext_sample_key(s.max);
    while (high - low > 1) {
        const uint32_t middle = low + (high - low) / 2;
        const bool     inside = sample_first_bucket(s, ggml_ext_sample_logit(middle)) <= bucket;
        high                  = inside ? middle : high;
        low                   = inside ? low : middle;
    }
    return high;
}

__device__ __forceinline__ sample_window sample_next_window(const sample_state & s, const sample_window & w,
                                                            int bucket) {
    sample_window next;
    if (w.shift < 0) {
        next.low  = uint64_t(sample_lowest_key(s, bucket)) << 32;
        next.high = bucket > 0 ? (uint64_t(sample_lowest_key(s, bucket - 1)) << 32) - 1 : w.high;
    } else {
        next.high           = w.high - (uint64_t(bucket) << w.shift);
        const uint64_t size = uint64_t(1) << w.shift;
        next.low            = next.high - w.low < size ? w.low : next.high - size + 1;
    }
    next.shift = 0;
    while ((next.high - next.low) >> next.shift >= sample_buckets) {
        next.shift++;
    }
    return next;
}

// The end of a prefix among the listed candidates; leaves its place and the mass of the prefix.
__device__ __forceinline__ void sample_find_listed(const sample_state & s, const sample_window & w, bool by_mass,
                                                   uint64_t target, uint64_t count, uint64_t mass) {
    sample_memory & m = *s.memory;
    if (threadIdx.x == 0) {
        m.n_listed = 0;
    }
    __syncthreads();
    sample_pass<4>(s.row, s.n, [&](float logit, int id) {
        const uint32_t key   = ggml_ext_sample_key(logit);
        const uint64_t place = ggml_ext_sample_place(key, uint32_t(id));
        if (key > ggml_ext_sample_key_nothing && place >= w.low && place <= w.high) {
            const unsigned i = atomicAdd(&m.n_listed, 1u);
            m.place[i]       = place;
            m.listed_mass[i] = s.with_mass ? ggml_ext_sample_mass(logit - s.max) : 0;
        }
    });
    __syncthreads();
    for (unsigned i = threadIdx.x; i < m.n_listed; i += blockDim.x) {
        uint64_t before = by_mass ? mass : count, through = mass + m.listed_mass[i];
        for (unsigned j = 0; j < m.n_listed; j++) {
            if (m.place[j] > m.place[i]) {
                before += by_mass ? m.listed_mass[j] : 1;
                through += m.listed_mass[j];
            }
        }
        if (before < target && target <= before + (by_mass ? m.listed_mass[i] : 1)) {
            m.found_place = m.place[i];
            m.found_mass  = through;
        }
    }
    __syncthreads();
}

struct sample_end {
    uint64_t place, mass;
};

__device__ __forceinline__ uint64_t sample_total_mass(sample_memory & m) {
    uint64_t part = 0, total;
    for (int i = int(threadIdx.x); i < sample_buckets; i += int(blockDim.x)) {
        part += sample_mass_of(m, i);
    }
    sample_scan(part, m.warp_part[0], &total);
    __syncthreads();
    return total;
}

// The shortest prefix of at least `target` candidates, or as much mass; there is one. A target of 0 stands for top_p of
// the mass of all.
__device__ __forceinline__ sample_end sample_find_end(sample_state & s, bool by_mass, uint64_t target, float top_p) {
    sample_memory & m     = *s.memory;
    sample_window   w     = { 0, ~uint64_t(0), -1 };
    uint64_t        count = 0, mass = 0;
    while (true) {
        if (w.shift >= 0) {
            sample_histogram<false>(s, w);
            s.first_histogram_valid = false;
        } else if (!s.first_histogram_valid) {
            sample_histogram<true>(s, w);
            s.first_histogram_valid = true;
        }
        if (target == 0) {
            target = ggml_ext_sample_share(top_p, sample_total_mass(m));
        }
        sample_find_bucket(m, by_mass, target, count, mass);
        const unsigned bucket = m.found;
        const unsigned size   = m.count[bucket];
        count                 = m.found_count;
        mass                  = m.found_mass;
        w                     = sample_next_window(s, w, int(bucket));
        __syncthreads();
        if (size <= sample_list) {
            break;
        }
    }
    sample_find_listed(s, w, by_mass, target, count, mass);
    const sample_end end = { m.found_place, m.found_mass };
    __syncthreads();
    return end;
}

// Place of the last kept candidate of `n`, as in the reference.
__device__ __forceinline__ uint64_t sample_find_cut(sample_state & s, const ggml_ext_sample_params & p, uint64_t best,
                                                    int n) {
    const bool min_p  = p.log_min_p > -INFINITY;
    const bool top_k  = p.top_k > 0 && p.top_k < n;
    uint64_t   cut    = 0;
    uint64_t   least  = ~uint64_t(0);  // top-p and min-p keep what is not behind it
    uint64_t   target = 0;             // of top-p
    if (p.min_keep >= n && p.min_keep > 1) {
        least = 0;
    }
    enum { TOP_K, MIN_KEEP, TOP_P, N };
#pragma unroll 1  // one copy of the code is large enough
    for (int goal = TOP_K; goal < N; goal++) {
        const bool wanted = goal == TOP_K    ? top_k :
                            goal == MIN_KEEP ? (s.with_mass || min_p) && p.min_keep > 1 && p.min_keep < n :
                                               s.with_mass;
        if (!wanted) {
            continue;
        }
        const uint64_t   number = goal == TOP_K ? p.top_k : goal == MIN_KEEP ? p.min_keep : target;
        const sample_end end    = sample_find_end(s, goal == TOP_P, number, p.top_p);
        if (goal == TOP_K) {
            cut    = end.place;
            target = ggml_ext_sample_share(p.top_p, end.mass);
        } else if (goal == MIN_KEEP) {
            least = end.place;
        } else {
            cut = max(cut, min(least, end.place));
        }
    }
    return min_p ? max(cut, min(least, ggml_ext_sample_min_p(best, p.log_min_p))) : cut;
}

}  // namespace ggml_ext
