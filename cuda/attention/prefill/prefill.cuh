// Attention of many queries in 8-bit integers: the kernel. prefill.h has the forms of its inputs.
//
// A block of threads has 128 rows (attention_block_rows), a warp 32 or 16 of them, and goes over the kv tokens of its
// chunk of the window in steps of 32 or 64 of them (step.cuh): logits in int32 (mma_s8), one float multiply-add per K scale,
// softmax in base 2, weights times V. The next step's K and V come in meanwhile.

#pragma once

#include "step.cuh"

namespace ggml_ext {

// ROWS adjacent rows of BYTES to rows of shared memory STRIDE apart, by N threads.
template <unsigned N, unsigned BYTES, unsigned ROWS, unsigned STRIDE>
__device__ __forceinline__ void attention_copy(unsigned thread, char * to, const char * from) {
    constexpr unsigned CHUNKS = BYTES / 16;
    const char *       source = from + thread * 16;
#pragma unroll
    for (unsigned i = 0; i < CHUNKS * ROWS; i += N) {
        // Where N is a multiple of CHUNKS only the row changes, by a constant.
        const unsigned chunk = N % CHUNKS == 0 ? thread : thread + i;
        const unsigned row   = chunk / CHUNKS + (N % CHUNKS == 0 ? i / CHUNKS : 0);
        if (CHUNKS * ROWS % N == 0 || thread + i < CHUNKS * ROWS) {
            cp_async<16>(to + row * STRIDE + chunk % CHUNKS * 16, source + i * 16);
        }
    }
}

// Asks for a step. p.steps stands where the cache's first step would be.
template <class S> __device__ __forceinline__ void attention_load(const attention_prefill & p, int step, char * to) {
    constexpr attention_step L    = S::LAYOUT;
    const unsigned           t    = keep_out_of_registers(threadIdx.x);
    const unsigned           head = keep_out_of_registers(blockIdx.x);
    const char * from = p.steps + (int64_t(head) * (p.window * (attention_tile / S::STEP)) + step) * L.bytes;
    attention_copy<S::THREADS, S::D, S::STEP, S::K_STRIDE>(t, to, from);
    attention_copy<S::THREADS, L.v_at - L.scales_at, 1, 0>(t, to + S::SCALES_AT, from + L.scales_at);
    attention_copy<S::THREADS, S::V_ROW_BYTES, S::V_ROWS, S::V_STRIDE>(t, to + S::V_AT, from + L.v_at);
    if constexpr (S::FULL) {
        attention_copy<S::THREADS, L.bytes - L.levels_at, 1, 0>(t, to + S::LEVELS_AT, from + L.levels_at);
    }
}

// The block's summary of the mask, a byte per tile.
const __device__ __forceinline__ uint8_t * attention_visible_of(const attention_prefill & p) {
    return p.visible + (int64_t(attention_mask_stream(p)) * p.n_blocks + attention_block()) * p.n_tiles;
}

// The next tile from `tile` on that the block must see, or `end`.
__device__ __forceinline__ int attention_next_tile(const attention_prefill & p, int tile, int end) {
    if (!p.visible) {
        return min(tile, end);
    }
    const uint8_t * visible = attention_visible_of(p);
    while (tile < end) {
        const int      at   = tile + int(threadIdx.x % 32);
        const unsigned seen = __ballot_sync(0xffffffffu, at < end && visible[at] != ATTENTION_HIDDEN);
        if (seen) {
            return tile + __ffs(int(seen)) - 1;
        }
        tile += 32;
    }
    return end;
}

// Whether a tile's logits need attention_shift_logits.
__device__ __forceinline__ bool attention_is_mixed(const attention_prefill & p, int tile) {
    return p.softcap != 0.0f || (tile + 1) * attention_tile > p.n_kv ||
           (p.visible && attention_visible_of(p)[tile] == ATTENTION_MIXED);
}

template <class S>
__device__ __forceinline__ void attention_load_q(const attention_prefill & p, attention_state<S> & w) {
    const unsigned t   = keep_out_of_registers(threadIdx.x) % 4;
    const int64_t  row = attention_head() * p.padded_rows + attention_first_row<S>();
#pragma unroll
    for (int m = 0; m < S::ROW_TILES; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int64_t    at    = row + 16 * m + 8 * h;
            const uint32_t * codes = reinterpret_cast<const uint32_t *>(p.q_codes + at * S::D + 4 * t);
#pragma unroll
            for (int i = 0; i < S::D / 32; i++) {
                w.q[m][i][h]     = codes[8 * i];
                w.q[m][i][h + 2] = codes[8 * i + 4];
            }
        }
    }
}

template <class S> __device__ __forceinline__ void attention_begin(attention_state<S> & w) {
#pragma unroll
    for (int m = 0; m < S::ROW_TILES; m++) {
        w.max[m][0] = w.max[m][1] = -INFINITY;
        w.sum[m][0] = w.sum[m][1] = 0.0f;
#pragma unroll
        for (int n = 0; n < S::D / 8; n++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                w.o[m][n][j] = 0.0f;
            }
        }
    }
}

// Row r of kv head `head` (of all streams) in the result, floats.
__device__ __forceinline__ int64_t attention_out_at(const attention_prefill & p, int head, int r) {
    const int64_t query = int64_t(head / p.heads_kv) * p.n_q + r / p.gqa;
    return ((query * p.heads_kv + head % p.heads_kv) * p.gqa + r % p.gqa) * p.d;
}

// What a row's sum of weights times V is to be multiplied with. max: of the logits without bias, softcap excepted.
__device__ __forceinline__ float attention_normaliser(const attention_prefill & p, const attention_row & row, float max,
                                                      float sum) {
    const float whole   = p.softcap != 0.0f ? max : max + row.bias;
    const float new_max = fmaxf(whole, row.sink);
    if (row.sink == -INFINITY) {
        return sum == 0.0f ? 0.0f : 1.0f / sum;
    }
    const float scale = whole == -INFINITY ? (sum == 0.0f ? 0.0f : sum) : exp2_approx(whole - new_max);
    return scale / fmaf(sum, scale, exp2_approx(row.sink - new_max + attention_shift));
}

template <class S> __device__ __forceinline__ void attention_end(const attention_prefill & p, attention_state<S> & w) {
    const int lane = int(threadIdx.x % 32), head = attention_head();
#pragma unroll
    for (int m = 0; m < S::ROW_TILES; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int     r    = attention_first_row<S>() + 16 * m + 8 * h;
            const int64_t at   = head * p.padded_rows + r;
            const float   sum  = warp_sum<4>(w.sum[m][h]);
            float *       to   = nullptr;
            float         last = 1.0f;
            if (r >= p.n_rows) {
                continue;
            }
            if (!p.partial) {
                to   = p.out + attention_out_at(p, head, r);
                last = attention_normaliser(p, p.q_rows[at], w.max[m][h], sum);
            } else {
                const int64_t part = blockIdx.z * p.n_heads * p.padded_rows + at;
                to                 = p.partial + part * S::D;
                if (lane % 4 == 0) {
                    *reinterpret_cast<float2 *>(p.partial_meta + 2 * part) = make_float2(w.max[m][h], sum);
                }
            }
#pragma unroll
            for (int n = 0; n < S::D / 8; n++) {
                *reinterpret_cast<float2 *>(to + 8 * n + 2 * (lane % 4)) =
                    make_float2(w.o[m][n][2 * h] * last, w.o[m][n][2 * h + 1] * last);
            }
        }
    }
}

// Steps are numbered from the cache's first on.
template <class S>
__global__ void __launch_bounds__(S::THREADS, S::BLOCKS) attention_prefill_kernel(attention_prefill p) {
    GGML_EXT_DYNAMIC_SHARED(char, shared);
    constexpr int      PER_TILE = attention_tile / S::STEP;
    const int          end_tile = min(p.end_tile, p.first_tile + int(blockIdx.z + 1) * p.chunk);
    attention_state<S> w;
    attention_begin<S>(w);
    attention_load_q<S>(p, w);

    int step = attention_next_tile(p, p.first_tile + int(blockIdx.z) * p.chunk, end_tile) * PER_TILE;
    int here = 0;  // where the step is in shared memory
    if (step < end_tile * PER_TILE) {
        attention_load<S>(p, step, shared);
        cp_async_commit();
    }
    while (step < end_tile * PER_TILE) {
        const int  tile  = step / PER_TILE;
        const int  next  = (step + 1) % PER_TILE ? step + 1 : attention_next_tile(p, tile + 1, end_tile) * PER_TILE;
        const bool mixed = attention_is_mixed(p, tile);
        cp_async_wait<0>();
        __syncthreads();  // this step is there, and no thread is in the one before any more
        if (next < end_tile * PER_TILE) {
            attention_load<S>(p, next, shared + (S::STEP_BYTES - here));
            cp_async_commit();
        }
        if constexpr (S::RELOAD_Q) {
            attention_load_q<S>(p, w);
        }
        attention_take_step<S>(p, w, step * S::STEP, mixed, shared + here);
        step = next;
        here = S::STEP_BYTES - here;
    }
    attention_end<S>(p, w);
}

}  // namespace ggml_ext
