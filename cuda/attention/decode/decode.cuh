// Attention for few query tokens over a q8_0 or q4_0 cache, kernels.
//
// The heads that share a kv head times the query tokens are the rows of one product, so the cache is read once for all
// of them. Blocks take chunks of tokens, their warps 16 tokens in turn, each with a maximum and sums of its own
// (flash-decoding). A warp's copies need no barrier of the block: while it works on one step, its next one is on the
// way.

#pragma once

#include "attention/parts.cuh"
#include "warp.cuh"

namespace ggml_ext {

// Rows of K and V of a warp's steps in shared memory.
template <class K, class V> struct decode_stages {
    static constexpr int k_bytes = decode_step * K::stride, bytes = k_bytes + decode_step * V::stride;

    char *          shared;  // [decode_n_stages] stages of this warp
    int             lane;
    cache_copies<K> k_copies;
    cache_copies<V> v_copies;
    int             k_low, k_high, v_low, v_high, v_rows[4];  // offsets of rows in a stage

    // k, v: the warp's first token. Steps are 16 tokens apart or a multiple, so in all of them row i lies as far from a
    // multiple of 16.
    __device__ __forceinline__ decode_stages(const char * k, const char * v, int64_t k_token, int64_t v_token,
                                             char * shared) :
        shared(shared), lane(int(threadIdx.x % 32)), k_copies(k, k_token, lane), v_copies(v, v_token, lane) {
        const int  g = lane / 4, t = lane % 4;
        const auto k_row = [&](int i) { return i * K::stride + cache_copies<K>::misaligned(k, i * k_token); };
        const auto v_row = [&](int i) { return k_bytes + i * V::stride + cache_copies<V>::misaligned(v, i * v_token); };
        k_low            = k_row(g);
        k_high           = k_row(g + 8);
        v_low            = v_row(g);
        v_high           = v_row(g + 8);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            v_rows[i] = v_row(2 * t + i % 2 + i / 2 * 8);
        }
    }

    // Starts the copies of the warp's next step, which begins at `token`.
    __device__ __forceinline__ void issue(int stage, const attention_decode_args & args, const decode_place & p,
                                          int token) {
        char * const to = shared + stage * bytes;
        if (token + decode_step <= p.end && token + decode_step < args.n_kv) {
            k_copies.issue(to, args.nb_k[1], lane);
            v_copies.issue(to + k_bytes, args.nb_v[1], lane);
        } else {
            k_copies.issue_last(to, p.k(args) + token * args.nb_k[1], args.nb_k[1], p.end - token, lane);
            v_copies.issue_last(to + k_bytes, p.v(args) + token * args.nb_v[1], args.nb_v[1], p.end - token, lane);
        }
        cp_async_commit();
        k_copies.advance(decode_warps * decode_step * args.nb_k[1]);
        v_copies.advance(decode_warps * decode_step * args.nb_v[1]);
    }
};

// Adds up what the warps of the block have, and writes the chunk's part of the result.
template <class K, class V, int GROUPS>
__device__ __forceinline__ void decode_finish(const attention_decode_args & args, const decode_place & p,
                                              decode_warp<K, V, GROUPS> & state, float * sums, float * results) {
    constexpr int rows = 8 * GROUPS, dim = K::dim;
    const int     warp = int(threadIdx.x / 32);
    float *const tops = results, *const totals = results + decode_warps * rows;  // [warp][row]
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            float total = state.total[group][c];
#pragma unroll
            for (int offset = 4; offset < 32; offset *= 2) {
                total += __shfl_xor_sync(0xffffffffu, total, offset);
            }
            if (state.g == 0) {
                const int row             = 8 * group + 2 * state.t + c;
                tops[warp * rows + row]   = state.top[group][c];
                totals[warp * rows + row] = total;
            }
        }
    }
    __syncthreads();  // and no warp reads its stages any more, where the sums go
    const auto top_of = [&](int row) {
        float top = tops[row];
        for (int w = 1; w < decode_warps; w++) {
            top = fmaxf(top, tops[w * rows + row]);
        }
        return top;
    };
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const int   row    = 8 * group + 2 * state.t + c;
            const float factor = attention_part_weight(state.top[group][c], top_of(row));
            float *     to     = sums + (warp * rows + row) * dim;
#pragma unroll
            for (int i = 0; i < 2 * state.blocks; i++) {
                to[state.channel(i, c)]     = state.o[group][i][c] * factor;
                to[state.channel(i, c + 2)] = state.o[group][i][c + 2] * factor;
            }
        }
    }
    __syncthreads();
    for (int i = int(threadIdx.x); i < p.n_rows * dim; i += 32 * decode_warps) {
        float sum = 0.0f;
        for (int w = 0; w < decode_warps; w++) {
            sum += sums[w * rows * dim + i];
        }
        args.sums[(decode_out_row(args, p, i / dim) * args.n_chunks + p.chunk) * dim + i % dim] = sum;
    }
    for (int row = int(threadIdx.x); row < p.n_rows; row += 32 * decode_warps) {
        const float top   = top_of(row);
        float       total = 0.0f;
        for (int w = 0; w < decode_warps; w++) {
            total += totals[w * rows + row] * attention_part_weight(tops[w * rows + row], top);
        }
        float * to = args.totals + 2 * (decode_out_row(args, p, row) * args.n_chunks + p.chunk);
        to[0]      = top;
        to[1]      = total;
    }
}

// Offsets in shared memory.
template <cache_type K_TYPE, cache_type V_TYPE, int DIM, int GROUPS> struct decode_layout {
    static constexpr size_t results = decode_results_offset(K_TYPE, V_TYPE, DIM, GROUPS);
    static constexpr size_t queries = decode_queries_offset(K_TYPE, V_TYPE, DIM, GROUPS);
};

// Grid: heads_kv * n_row_blocks * n_chunks, n_streams. Shared memory: decode_shared_bytes.
template <cache_type K_TYPE, cache_type V_TYPE, int DIM, int GROUPS>
static __global__ void __launch_bounds__(32 * decode_warps, decode_blocks_per_sm(DIM, GROUPS))
ggml_ext_attention_decode_kernel(attention_decode_args args) {
    using K = cache_row<K_TYPE, DIM>;
    using V = cache_row<V_TYPE, DIM>;
    GGML_EXT_DYNAMIC_SHARED(char, shared);
    using layout           = decode_layout<K_TYPE, V_TYPE, DIM, GROUPS>;
    float * const  results = reinterpret_cast<float *>(shared + layout::results);
    float * const  factors = reinterpret_cast<float *>(shared + layout::queries);
    float * const  slopes  = factors + 8 * GROUPS;
    int8_t * const codes   = reinterpret_cast<int8_t *>(slopes + 8 * GROUPS);

    const decode_place  p      = decode_where(args, 8 * GROUPS);
    const int           warp   = int(threadIdx.x / 32);
    const int           first  = p.first + warp * decode_step;  // of this warp
    constexpr int       stride = decode_warps * decode_step;    // from step to step
    decode_stages<K, V> stages(p.k(args) + first * args.nb_k[1], p.v(args) + first * args.nb_v[1], args.nb_k[1],
                               args.nb_v[1], shared + warp * decode_n_stages * decode_stages<K, V>::bytes);
    if (first < p.end) {
        stages.issue(0, args, p, first);
    }
    for (int i = warp; i < 8 * GROUPS; i += decode_warps) {
        decode_quantize<K>(args, p, i, codes + i * DIM, factors + i, slopes + i);
    }
    __syncthreads();
    decode_warp<K, V, GROUPS> state;
    state.g = int(threadIdx.x % 32) / 4;
    state.t = int(threadIdx.x % 4);
    state.begin(args, p, codes);
    __half mask[GROUPS][4];
    state.load_mask(mask, args.mask, first, p.end);

    int stage = 0;
    for (int token = first; token < p.end; token += stride, stage ^= 1) {
        cp_async_wait<0>();
        __syncwarp();  // all lanes' copies are there, and all lanes have left the other stage
        if (token + stride < p.end) {
            stages.issue(stage ^ 1, args, p, token + stride);
        }
        char * const rows = stages.shared + stage * decode_stages<K, V>::bytes;
        float        s[GROUPS][4];
        uint32_t     w[GROUPS][2];
        state.products(s, rows + stages.k_low, rows + stages.k_high);
        state.logits(s, mask, args.softcap, factors, slopes);
        state.load_mask(mask, args.mask, token + stride, p.end);
        state.rescale_online_softmax(s);
        state.weights(w, s);
        state.zero_nonfinite_v(s, rows + stages.v_low, rows + stages.v_high);
        const char * const v[4] = { rows + stages.v_rows[0], rows + stages.v_rows[1], rows + stages.v_rows[2],
                                    rows + stages.v_rows[3] };
        state.values(w, v);
    }
    decode_finish(args, p, state, reinterpret_cast<float *>(shared), results);
}

}  // namespace ggml_ext
