// Attention of many queries: what a warp does with the kv tokens of one step. Fragments are those of device.cuh: of a
// 16-row tile, this lane has rows g = lane / 4 and g + 8, and columns 2 t and 2 t + 1, t = lane % 4, of every 8.

#pragma once

#include "attention/logits.cuh"
#include "common/device.cuh"
#include "prefill.h"

namespace ggml_ext {

// Bytes from row to row of `bytes` in shared memory: an odd number of 16, so that the 8 rows of an ldmatrix lie in
// different banks.
constexpr __host__ __device__ int attention_stride(int bytes) {
    return bytes + (bytes % 32 == 0 ? 16 : 0);
}

template <int D_, int GROUPS_, bool FULL_> struct attention_shape {
    static constexpr int  D = D_, GROUPS = GROUPS_;
    static constexpr bool FULL      = FULL_;
    // With 32 rows a warp loads half the fragments of K and V per product; D = 256 has no registers for that, and 8-bit
    // weights need few loads.
    static constexpr int  ROW_TILES = D <= 128 && !FULL ? 2 : 1;
    static constexpr int  WARPS     = attention_block_rows / 16 / ROW_TILES;
    static constexpr int  THREADS   = 32 * WARPS;
    static constexpr int  BLOCKS    = FULL || D > 128 ? 1 : 2;  // per multiprocessor, as registers allow

    // What keeps registers from being spilled. RELOAD_Q: Q comes from memory in every step; before sm_80 mma_s8 is four
    // instructions that take more registers. FENCE_LOGITS: the compiler must not mix logits with what follows.
    static constexpr bool OLD      = GGML_EXT_CUDA_ARCH > 0 && GGML_EXT_CUDA_ARCH < 800;
    static constexpr bool RELOAD_Q = (D == 128 && FULL && GGML_EXT_CUDA_ARCH < 900 && GGML_EXT_CUDA_ARCH > 0) ||
                                     (OLD && GROUPS > 1 && (D == 96 || D == 256));
    static constexpr bool FENCE_LOGITS = !OLD && GROUPS > 1;

    static constexpr attention_step LAYOUT = { D, GROUPS, FULL };  // in global memory
    static constexpr int            STEP   = LAYOUT.tokens;

    // In shared memory rows of codes and of f16 V are padded. V has a row per token, in full mode per channel.
    static constexpr int V_ROWS      = FULL ? D : STEP;
    static constexpr int V_ROW_BYTES = FULL ? STEP : 2 * D;
    static constexpr int K_STRIDE    = attention_stride(D);
    static constexpr int V_STRIDE    = attention_stride(V_ROW_BYTES);
    static constexpr int SCALES_AT   = STEP * K_STRIDE;
    static constexpr int V_AT        = SCALES_AT + LAYOUT.v_at - LAYOUT.scales_at;
    static constexpr int LEVELS_AT   = V_AT + V_ROWS * V_STRIDE;
    static constexpr int STEP_BYTES  = LEVELS_AT + LAYOUT.bytes - LAYOUT.levels_at;
};

// Bytes of dynamic shared memory, for the launch.
template <class S> constexpr int attention_shared_bytes() {
    return 2 * S::STEP_BYTES;
}

// Grid (n_heads, n_blocks, n_chunks): the last rows, which see most under a causal mask, come first.
__device__ __forceinline__ int attention_head() {
    return int(blockIdx.x);
}

__device__ __forceinline__ int attention_block() {
    return int(gridDim.y - 1 - blockIdx.y);
}

__device__ __forceinline__ int attention_mask_stream(const attention_prefill & p) {
    return p.n_mask_streams == 1 ? 0 : attention_head() / p.heads_kv % int(p.n_mask_streams);
}

// This lane's first row of the warp's.
template <class S> __device__ __forceinline__ int attention_first_row() {
    const unsigned thread = keep_out_of_registers(threadIdx.x), lane = thread % 32, warp = thread / 32;
    return attention_block() * attention_block_rows + int(warp * 16 * S::ROW_TILES + lane / 4);
}

// What a warp keeps over all steps.
template <class S> struct attention_state {
    uint32_t q[S::ROW_TILES][S::D / 32][4];
    float    max[S::ROW_TILES][2];  // of the logits, perhaps less by attention_slack
    float    sum[S::ROW_TILES][2];  // of this lane's columns
    float    o[S::ROW_TILES][S::D / 8][4];
};

// Weights are exp2(logit - max + attention_shift). A maximum is replaced only where the logits exceed it by
// attention_slack, which changes no result: weights stay below 2^14, and f16 holds those down to 2^-22 of the largest
// with all of its bits.
constexpr float attention_shift = 8.0f;
constexpr float attention_slack = 6.0f;

// x = logits over the q scale.
template <class S>
__device__ __forceinline__ void attention_logits(const attention_state<S> & w, const char * step,
                                                 float (&x)[S::ROW_TILES][S::STEP / 8][4]) {
    constexpr int  PER_GROUP = S::D / 32 / S::GROUPS;  // mma per scale
    const unsigned lane      = keep_out_of_registers(threadIdx.x) % 32;
    const float *  scales    = reinterpret_cast<const float *>(step + S::SCALES_AT) + 2 * (lane % 4);
    const char *   rows      = step + lane % 8 * S::K_STRIDE + lane / 8 * 16;
#pragma unroll
    for (int n = 0; n < S::STEP / 8; n++) {
        const float * scale = scales + 8 * n;
        uint32_t      b[S::D / 32][2];
#pragma unroll
        for (int i = 0; i < S::D / 64; i++) {
            uint32_t r[4];
            ldmatrix_x4(r, rows + 8 * n * S::K_STRIDE + 64 * i);
            b[2 * i][0] = r[0], b[2 * i][1] = r[1], b[2 * i + 1][0] = r[2], b[2 * i + 1][1] = r[3];
        }
        if constexpr (S::D % 64 != 0) {
            ldmatrix_x2(b[S::D / 32 - 1], rows + 8 * n * S::K_STRIDE + S::D - 32);
        }
        const float2 offset = *reinterpret_cast<const float2 *>(scale + S::GROUPS * S::STEP);
#pragma unroll
        for (int m = 0; m < S::ROW_TILES; m++) {
            x[m][n][0] = x[m][n][2] = offset.x;
            x[m][n][1] = x[m][n][3] = offset.y;
        }
#pragma unroll
        for (int g = 0; g < S::GROUPS; g++) {
            const float2 k_scale = *reinterpret_cast<const float2 *>(scale + g * S::STEP);
#pragma unroll
            for (int m = 0; m < S::ROW_TILES; m++) {
                int32_t sum[4] = { magic_bits, magic_bits, magic_bits, magic_bits };
#pragma unroll
                for (int i = 0; i < PER_GROUP; i++) {
                    mma_s8(sum, w.q[m][g * PER_GROUP + i], b[g * PER_GROUP + i]);
                }
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    x[m][n][j] = fmaf(__int_as_float(sum[j]), j % 2 ? k_scale.y : k_scale.x, x[m][n][j]);
                }
            }
        }
    }
}

// The rows' q scales, read anew in every step: registers are scarcer than loads.
template <class S>
__device__ __forceinline__ void attention_scales(const attention_prefill & p, float (&scale)[S::ROW_TILES][2]) {
    const int64_t         first = attention_head() * p.padded_rows + attention_first_row<S>();
    const attention_row * rows  = p.q_rows + first;
#pragma unroll
    for (int m = 0; m < S::ROW_TILES; m++) {
        scale[m][0] = rows[16 * m].scale;
        scale[m][1] = rows[16 * m + 8].scale;
    }
}

// Turns x into whole logits, with softcap, mask and ALiBi: what only some tiles need, and scale into 1.
// token: the step's first.
template <class S>
__device__ __forceinline__ void attention_shift_logits(const attention_prefill & p, int token,
                                                       float (&scale)[S::ROW_TILES][2],
                                                       float (&x)[S::ROW_TILES][S::STEP / 8][4]) {
    const unsigned lane  = keep_out_of_registers(threadIdx.x) % 32;
    const int      first = token + int(2 * (lane % 4));
#pragma unroll
    for (int m = 0; m < S::ROW_TILES; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int           row   = attention_first_row<S>() + 16 * m + 8 * h;
            const int           query = min(row, p.n_rows - 1) / p.gqa;
            const attention_row data  = p.q_rows[attention_head() * p.padded_rows + row];
            const half *        mask  = reinterpret_cast<const half *>(p.mask.data + query * p.mask.nb1 +
                                                                       attention_mask_stream(p) * p.mask.nb3);
            const float         bias  = p.softcap != 0.0f ? data.bias : 0.0f;
#pragma unroll
            for (int i = 0; i < S::STEP / 4; i++) {
                const int column = first + i / 2 * 8 + i % 2;
                float &   y      = x[m][i / 2][2 * h + i % 2];
                y                = fmaf(y, scale[m][h], bias);
                if (p.softcap != 0.0f) {
                    y = attention_softcap(p.softcap, y);
                }
                float shift = column < p.n_kv ? 0.0f : -INFINITY;
                if (p.mask.data && column < p.n_kv) {
                    shift = __half2float(mask[column]);
                }
                // What is hidden stays so, even if it is NaN.
                y = shift == -INFINITY ? -INFINITY : fmaf(data.slope, shift, y);
            }
            scale[m][h] = 1.0f;
        }
    }
}

// The largest logit of each row, where whole logits are x * scale.
template <class S>
__device__ __forceinline__ void attention_row_max(const float (&x)[S::ROW_TILES][S::STEP / 8][4],
                                                  const float (&scale)[S::ROW_TILES][2],
                                                  float (&max)[S::ROW_TILES][2]) {
#pragma unroll
    for (int m = 0; m < S::ROW_TILES; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float y = fmaxf(x[m][0][2 * h], x[m][0][2 * h + 1]);
#pragma unroll
            for (int n = 1; n < S::STEP / 8; n++) {
                y = fmaxf(y, fmaxf(x[m][n][2 * h], x[m][n][2 * h + 1]));
            }
            max[m][h] = warp_max<4>(y) * scale[m][h];
        }
    }
}

// Raises the running maxima to those of the step where that is due.
template <class S>
__device__ __forceinline__ void attention_rescale_online_softmax(attention_state<S> & w,
                                                                 const float (&step_max)[S::ROW_TILES][2]) {
    bool due = false;
#pragma unroll
    for (int m = 0; m < S::ROW_TILES; m++) {
        due = due || step_max[m][0] > w.max[m][0] + attention_slack || step_max[m][1] > w.max[m][1] + attention_slack;
    }
    if (!__any_sync(0xffffffffu, due)) {
        return;
    }
#pragma unroll
    for (int m = 0; m < S::ROW_TILES; m++) {
        float alpha[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float max = fmaxf(w.max[m][h], step_max[m][h]);
            alpha[h]        = max == -INFINITY ? 1.0f : exp2_approx(w.max[m][h] - max);
            w.max[m][h]     = max;
            w.sum[m][h] *= alpha[h];
        }
#pragma unroll
        for (int n = 0; n < S::D / 8; n++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                w.o[m][n][j] *= alpha[j / 2];
            }
        }
    }
}

__device__ __forceinline__ uint32_t attention_pack(float low, float high) {
    const half2 both = __floats2half2_rn(low, high);
    uint32_t    bits;
    memcpy(&bits, &both, sizeof(bits));
    return bits;
}

// Half: weights as f16 times V.
template <class S>
__device__ __forceinline__ void attention_accumulate_half(attention_state<S> & w, const char * v,
                                                          const float (&scale)[S::ROW_TILES][2],
                                                          float (&x)[S::ROW_TILES][S::STEP / 8][4]) {
    const unsigned lane = keep_out_of_registers(threadIdx.x) % 32;
    const char *   rows = v + lane % 16 * S::V_STRIDE + lane / 16 * 16;
    uint32_t       weights[S::ROW_TILES][S::STEP / 16][4];
#pragma unroll
    for (int m = 0; m < S::ROW_TILES; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float start = attention_shift - (w.max[m][h] == -INFINITY ? 0.0f : w.max[m][h]);
#pragma unroll
            for (int n = 0; n < S::STEP / 8; n++) {
                const float a = exp2_approx(fmaf(x[m][n][2 * h], scale[m][h], start));
                const float b = exp2_approx(fmaf(x[m][n][2 * h + 1], scale[m][h], start));
                w.sum[m][h] += a + b;
                weights[m][n / 2][n % 2 * 2 + h] = attention_pack(a, b);
            }
        }
    }
#pragma unroll
    for (int s = 0; s < S::STEP / 16; s++) {
#pragma unroll
        for (int n = 0; n < S::D / 16; n++) {
            uint32_t r[4];
            ldmatrix_x4_trans(r, rows + 16 * s * S::V_STRIDE + 32 * n);
            const uint32_t even[2] = { r[0], r[1] }, odd[2] = { r[2], r[3] };
#pragma unroll
            for (int m = 0; m < S::ROW_TILES; m++) {
                mma_f16(w.o[m][2 * n], weights[m][s], even);
                mma_f16(w.o[m][2 * n + 1], weights[m][s], odd);
            }
        }
    }
}

// Four weights as bytes.
__device__ __forceinline__ uint32_t attention_pack_bytes(float2 a, float2 b, float2 a_level, float2 b_level) {
    const auto     byte = [](float weight, float level) { return __float_as_uint(fmaf(weight, level, magic)); };
    const uint32_t low  = __byte_perm(byte(a.x, a_level.x), byte(a.y, a_level.y), 0x0040);
    return __byte_perm(low, __byte_perm(byte(b.x, b_level.x), byte(b.y, b_level.y), 0x0040), 0x5410);
}

// Full: weights, relative to the step's maximum and times the tokens' V scales, as bytes times V's codes.
template <class S>
__device__ __forceinline__ void attention_accumulate_full(attention_state<S> & w, const char * v, const float * levels,
                                                          const float (&scale)[S::ROW_TILES][2],
                                                          const float (&step_max)[S::ROW_TILES][2],
                                                          float (&x)[S::ROW_TILES][S::STEP / 8][4]) {
    const unsigned lane = keep_out_of_registers(threadIdx.x) % 32;
    const char *   rows = v + lane % 8 * S::V_STRIDE + lane / 8 * 16;
#pragma unroll
    for (int m = 0; m < S::ROW_TILES; m++) {
        uint32_t weights[S::STEP / 32][4];
        float    gamma[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float running = w.max[m][h] == -INFINITY ? 0.0f : w.max[m][h];
            // Larger by more than what its product was rounded by, so that no weight exceeds 1.
            const float max =
                step_max[m][h] == -INFINITY ? 0.0f : fmaf(fabsf(step_max[m][h]), 0x1p-22f, step_max[m][h]);
            gamma[h]  = exp2_approx(max - running + attention_shift);
            float sum = 0.0f;
#pragma unroll
            for (int n = 0; n < S::STEP / 8; n += 2) {
                float2 a, b;
                a.x = exp2_approx(fmaf(x[m][n][2 * h], scale[m][h], -max));
                a.y = exp2_approx(fmaf(x[m][n][2 * h + 1], scale[m][h], -max));
                b.x = exp2_approx(fmaf(x[m][n + 1][2 * h], scale[m][h], -max));
                b.y = exp2_approx(fmaf(x[m][n + 1][2 * h + 1], scale[m][h], -max));
                sum += (a.x + a.y) + (b.x + b.y);
                const float2 * level              = reinterpret_cast<const float2 *>(levels + 8 * n + 2 * (lane % 4));
                weights[n / 4][n / 2 % 2 * 2 + h] = attention_pack_bytes(a, b, level[0], level[4]);
            }
            w.sum[m][h] = fmaf(sum, gamma[h], w.sum[m][h]);
            gamma[h] *= levels[S::STEP];
        }
#pragma unroll
        for (int n = 0; n < S::D / 8; n++) {
            uint32_t r[4];
            ldmatrix_x4(r, rows + 8 * n * S::V_STRIDE);
            const uint32_t low[2] = { r[0], r[1] }, high[2] = { r[2], r[3] };
            int32_t        sum[4] = { magic_bits, magic_bits, magic_bits, magic_bits };
            mma_u8s8(sum, weights[0], low);
            mma_u8s8(sum, weights[1], high);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                w.o[m][n][j] = fmaf(__int_as_float(sum[j]) - magic, gamma[j / 2], w.o[m][n][j]);
            }
        }
    }
}

// One step. token: its first.
template <class S>
__device__ __forceinline__ void attention_take_step(const attention_prefill & p, attention_state<S> & w, int token,
                                                    bool mixed, const char * step) {
    float x[S::ROW_TILES][S::STEP / 8][4], scale[S::ROW_TILES][2], max[S::ROW_TILES][2];
    attention_logits<S>(w, step, x);
    if constexpr (S::FENCE_LOGITS) {
        __syncwarp();
    }
    attention_scales<S>(p, scale);
    if (mixed) {
        attention_shift_logits<S>(p, token, scale, x);
    }
    attention_row_max<S>(x, scale, max);
    attention_rescale_online_softmax<S>(w, max);
    if constexpr (S::FULL) {
        const float * levels = reinterpret_cast<const float *>(step + S::LEVELS_AT);
        attention_accumulate_full<S>(w, step + S::V_AT, levels, scale, max, x);
    } else {
        attention_accumulate_half<S>(w, step + S::V_AT, scale, x);
    }
}

}  // namespace ggml_ext
