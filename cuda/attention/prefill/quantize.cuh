// What attention of many queries does before it: Q, K and V into the forms of prefill.h.

#pragma once

#include "attention/logits.cuh"
#include "common/device.cuh"
#include "prefill.h"

namespace ggml_ext {

constexpr int attention_prepare_threads = 256;
constexpr int attention_max_quads       = 2;  // of 4 channels that a lane holds: heads up to 256

__device__ __forceinline__ bool attention_finite(float x) {
    return fabsf(x) < INFINITY;
}

// Four codes, one a byte. |x * inverse| <= 127 and a little; what is not finite gives any code.
__device__ __forceinline__ uint32_t attention_codes(float4 x, float inverse) {
    const auto code = [&](float value) { return uint32_t(__float2int_rn(value * inverse)) & 0xff; };
    return code(x.x) | code(x.y) << 8 | code(x.z) << 16 | code(x.w) << 24;
}

// 127 / max, and 0 where that overflows: such values count as zeros.
__device__ __forceinline__ float attention_inverse(float max) {
    return max > 4e-37f ? 127.0f / max : 0.0f;
}

__device__ __forceinline__ float attention_max_abs(float4 x) {
    return fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w)));
}

__device__ __forceinline__ bool attention_all_finite(float4 x) {
    return attention_finite(x.x) && attention_finite(x.y) && attention_finite(x.z) && attention_finite(x.w);
}

// Four channels of a cache row: values = scale * codes, for f16 the values alone.
struct attention_quad {
    float4   values;
    uint32_t codes;
    float    scale;
};

// Channels 4 i .. 4 i + 3. Blocks of quantised types are 34 and 18 bytes long, so that words lie at multiples of 2.
__device__ __forceinline__ attention_quad attention_load_quad(attention_type type, const char * row, int i) {
    attention_quad quad   = {};
    const auto     halves = [](const char * p) {
        const uint16_t * at = reinterpret_cast<const uint16_t *>(p);
        return at[0] | uint32_t(at[1]) << 16;
    };
    if (type == ATTENTION_F16) {
        const half2 * at  = reinterpret_cast<const half2 *>(row + 8 * i);
        const float2  low = __half22float2(at[0]), high = __half22float2(at[1]);
        quad.values = make_float4(low.x, low.y, high.x, high.y);
        return quad;
    }
    if (type == ATTENTION_Q8_0) {
        const char * block = row + 34 * (i / 8);
        quad.scale         = __half2float(*reinterpret_cast<const half *>(block));
        quad.codes         = halves(block + 2 + 4 * (i % 8));
    } else {
        const char *   block  = row + 18 * (i / 8);
        const uint32_t both   = halves(block + 2 + 4 * (i % 4));
        const uint32_t nibble = (i % 8 < 4 ? both : both >> 4) & 0x0f0f0f0f;
        // As 16 (nibble - 8), which gives integer sums the resolution of q8_0's: they are as exact as magic
        // times the scale is.
        quad.codes            = nibble << 4 ^ 0x80808080;
        quad.scale            = __half2float(*reinterpret_cast<const half *>(block)) / 16.0f;
    }
    const auto value = [&](int byte) { return float(int8_t(quad.codes >> 8 * byte)) * quad.scale; };
    quad.values      = make_float4(value(0), value(1), value(2), value(3));
    return quad;
}

const __device__ __forceinline__ char * attention_row_of(const attention_tensor & t, int head, int heads_kv,
                                                         int64_t token) {
    return t.data + token * t.nb1 + head % heads_kv * t.nb2 + head / heads_kv * t.nb3;
}

// --- smoothing: the mean of K over a head's tokens, of those whose values are all finite in the channel ---

// Sums over a tile. Grid (n_tiles, n_heads), one thread per channel.
static __global__ void attention_k_sums_kernel(attention_prefill p) {
    const int tile = int(blockIdx.x), head = int(blockIdx.y), channel = int(threadIdx.x);
    if (channel >= p.d) {
        return;
    }
    const int end = min(p.n_kv, (tile + 1) * attention_tile);
    float     sum = 0.0f;
    for (int token = tile * attention_tile; token < end; token++) {
        const half * row   = reinterpret_cast<const half *>(attention_row_of(p.k, head, p.heads_kv, token));
        const float  value = __half2float(row[channel]);
        sum += attention_finite(value) ? value : 0.0f;
    }
    p.k_sums[(int64_t(head) * p.n_tiles + tile) * p.d + channel] = sum;
}

// Grid n_heads, one thread per channel.
static __global__ void attention_k_mean_kernel(attention_prefill p) {
    const int head = int(blockIdx.x), channel = int(threadIdx.x);
    if (channel >= p.d) {
        return;
    }
    float sum = 0.0f;
    for (int tile = 0; tile < p.n_tiles; tile++) {
        sum += p.k_sums[(int64_t(head) * p.n_tiles + tile) * p.d + channel];
    }
    p.k_mean[int64_t(head) * p.d + channel] = sum / float(p.n_kv);
}

// --- Q: a warp per row. Grid-stride loop over n_heads * padded_rows ---

__device__ __forceinline__ attention_row attention_make_row(const attention_prefill & p, int q_head, float max,
                                                            float dot_mean) {
    const float   unit = p.softcap != 0.0f ? p.scale / p.softcap : p.scale * log2_e;
    attention_row row;
    row.scale = attention_inverse(max) > 0.0f || !attention_finite(max) ? max / 127.0f * unit : 0.0f;
    row.bias  = dot_mean * unit;
    row.slope = attention_slope(p.max_bias, p.heads_kv * p.gqa, q_head) * log2_e;
    row.sink  = p.sinks ? p.sinks[q_head] * log2_e : -INFINITY;
    return row;
}

static __global__ void __launch_bounds__(attention_prepare_threads) attention_quantize_q_kernel(attention_prefill p) {
    const int     lane   = int(threadIdx.x % 32);
    const int64_t n_rows = p.n_heads * p.padded_rows;
    const int64_t step   = int64_t(gridDim.x) * (blockDim.x / 32);
    for (int64_t i = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32; i < n_rows; i += step) {
        const int    head = int(i / p.padded_rows), r = int(i % p.padded_rows);
        const bool   real   = r < p.n_rows;
        const int    q_head = head % p.heads_kv * p.gqa + r % p.gqa;
        const char * row    = p.q.data + int64_t(r / p.gqa) * p.q.nb1 + q_head * p.q.nb2 + head / p.heads_kv * p.q.nb3;
        float4       x[attention_max_quads];
        float        max = 0.0f, dot = 0.0f;
        bool         poisoned = false;
#pragma unroll
        for (int j = 0; j < attention_max_quads; j++) {
            const int quad = lane + 32 * j;
            x[j]           = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (real && 4 * quad < p.d) {
                x[j]     = *reinterpret_cast<const float4 *>(row + 16 * quad);
                max      = fmaxf(max, attention_max_abs(x[j]));
                poisoned = poisoned || !attention_all_finite(x[j]);
                if (p.k_mean) {
                    const float * mean = p.k_mean + int64_t(head) * p.d + 4 * quad;
                    dot += x[j].x * mean[0] + x[j].y * mean[1] + x[j].z * mean[2] + x[j].w * mean[3];
                }
            }
        }
        max                 = __any_sync(0xffffffffu, poisoned) ? __int_as_float(0x7fffffff) : warp_max(max);
        dot                 = warp_sum(dot);
        const float inverse = attention_inverse(max);
#pragma unroll
        for (int j = 0; j < attention_max_quads; j++) {
            const int quad = lane + 32 * j;
            if (4 * quad < p.d) {
                reinterpret_cast<uint32_t *>(p.q_codes + i * p.d)[quad] = attention_codes(x[j], inverse);
            }
        }
        if (lane == 0) {
            p.q_rows[i] = attention_make_row(p, q_head, max, dot);
        }
    }
}

// --- K and V: a block per step of the window, a warp per token. Grid (steps of the window, n_heads) ---
// A token with a NaN or an Inf in K or V gets K scales that are NaN and V that is zero: rows that see it become NaN,
// others do not. Tokens behind the end of the cache are zeros.

// Codes and scales of K for token i of a step. lane's quads are lane + 32 j.
__device__ __forceinline__ void attention_put_k(const attention_prefill & p, const attention_step & layout, char * step,
                                                int i, bool poisoned, const attention_quad (&k)[attention_max_quads]) {
    const int   lane   = int(threadIdx.x % 32);
    const float bad    = __int_as_float(0x7fffffff);
    float *     scales = reinterpret_cast<float *>(step + layout.scales_at) + i;
    float       max = 0.0f, total = 0.0f;
    if (p.groups == 1) {
#pragma unroll
        for (int j = 0; j < attention_max_quads; j++) {
            max = fmaxf(max, attention_max_abs(k[j].values));
        }
        max = warp_max(max);
    }
    const float inverse = attention_inverse(max);
#pragma unroll
    for (int j = 0; j < attention_max_quads; j++) {
        const int quad = lane + 32 * j;
        if (4 * quad < p.d) {
            const uint32_t codes = p.groups == 1 ? attention_codes(k[j].values, inverse) : k[j].codes;
            reinterpret_cast<uint32_t *>(step + i * p.d)[quad] = codes;
            if (p.groups > 1 && quad % 8 == 0) {
                scales[quad / 8 * layout.tokens] = poisoned ? bad : k[j].scale;
                total += k[j].scale;
            }
        }
    }
    total = p.groups == 1 ? (inverse > 0.0f ? max / 127.0f : 0.0f) : warp_sum(total);
    if (lane == 0) {
        if (p.groups == 1) {
            scales[0] = poisoned ? bad : total;
        }
        scales[p.groups * layout.tokens] = poisoned ? bad : -magic * total;
    }
}

// Half: V as f16.
__device__ __forceinline__ void attention_put_v(const attention_prefill & p, char * to, bool poisoned,
                                                const attention_quad (&v)[attention_max_quads]) {
#pragma unroll
    for (int j = 0; j < attention_max_quads; j++) {
        const int quad = int(threadIdx.x % 32) + 32 * j;
        if (4 * quad < p.d) {
            const float4 x                              = poisoned ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : v[j].values;
            reinterpret_cast<half2 *>(to)[2 * quad]     = __floats2half2_rn(x.x, x.y);
            reinterpret_cast<half2 *>(to)[2 * quad + 1] = __floats2half2_rn(x.z, x.w);
        }
    }
}

// Full: codes of a token and max|v|.
__device__ __forceinline__ void attention_stage_v(const attention_prefill & p, char * codes, float * level,
                                                  bool poisoned, const attention_quad (&v)[attention_max_quads]) {
    float max = 0.0f;
#pragma unroll
    for (int j = 0; j < attention_max_quads; j++) {
        max = fmaxf(max, attention_max_abs(v[j].values));
    }
    max                 = poisoned ? 0.0f : warp_max(max);
    const float inverse = attention_inverse(max);
#pragma unroll
    for (int j = 0; j < attention_max_quads; j++) {
        const int quad = int(threadIdx.x % 32) + 32 * j;
        if (4 * quad < p.d) {
            reinterpret_cast<uint32_t *>(codes)[quad] = attention_codes(v[j].values, inverse);
        }
    }
    if (threadIdx.x % 32 == 0) {
        *level = inverse > 0.0f ? max : 0.0f;
    }
}

// Full: a step's codes, transposed from [64][d], levels and unit.
__device__ __forceinline__ void attention_put_v_full(const attention_prefill & p, const attention_step & layout,
                                                     char * step, const char * codes, const float * levels) {
    float max = 0.0f;
    for (int i = 0; i < layout.tokens; i++) {
        max = fmaxf(max, levels[i]);
    }
    float * to_levels = reinterpret_cast<float *>(step + layout.levels_at);
    if (threadIdx.x < unsigned(layout.tokens)) {
        to_levels[threadIdx.x] = max > 0.0f ? 255.0f * (levels[threadIdx.x] / max) : 0.0f;
    }
    if (threadIdx.x == 0) {
        to_levels[layout.tokens] = max / 127.0f / 255.0f;
    }
    uint32_t * to = reinterpret_cast<uint32_t *>(step + layout.v_at);
    for (int i = int(threadIdx.x); i < p.d * 16; i += int(blockDim.x)) {
        const int channel = i / 16, first = i % 16 / 4 * 16 + i % 4 * 2;  // i % 16: 4 (2 s + h) + t
        uint32_t  word = 0;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            word |= uint32_t(uint8_t(codes[(first + j / 2 * 8 + j % 2) * p.d + channel])) << 8 * j;
        }
        to[i] = word;
    }
}

template <bool FULL>
__global__ void __launch_bounds__(attention_prepare_threads) attention_prepare_kv_kernel(attention_prefill p) {
    GGML_EXT_DYNAMIC_SHARED(char, shared);  // full: max|v| [64], V codes [64][d]
    const attention_step & layout = p.layout;
    float *                levels = reinterpret_cast<float *>(shared);
    char *                 codes  = shared + layout.tokens * sizeof(float);
    const int              head = int(blockIdx.y), lane = int(threadIdx.x % 32);
    const int64_t          n_steps = p.window * (attention_tile / layout.tokens);
    char *                 step    = p.steps + (head * n_steps + blockIdx.x) * layout.bytes;
    for (int i = int(threadIdx.x / 32); i < layout.tokens; i += int(blockDim.x / 32)) {
        const int64_t  token = int64_t(p.first_tile) * attention_tile + int64_t(blockIdx.x) * layout.tokens + i;
        const char *   k_row = attention_row_of(p.k, head, p.heads_kv, token);
        const char *   v_row = attention_row_of(p.v, head, p.heads_kv, token);
        attention_quad k[attention_max_quads] = {}, v[attention_max_quads] = {};
        bool           poisoned = false;
#pragma unroll
        for (int j = 0; j < attention_max_quads; j++) {
            const int quad = lane + 32 * j;
            if (token < p.n_kv && 4 * quad < p.d) {
                k[j]     = attention_load_quad(p.k.type, k_row, quad);
                v[j]     = attention_load_quad(p.v.type, v_row, quad);
                poisoned = poisoned || !attention_all_finite(k[j].values) || !attention_all_finite(v[j].values) ||
                           (!FULL && attention_max_abs(v[j].values) > 65504.0f);
                if (p.k_mean) {
                    const float * mean = p.k_mean + int64_t(head) * p.d + 4 * quad;
                    const float4  x    = k[j].values;
                    k[j].values        = make_float4(x.x - mean[0], x.y - mean[1], x.z - mean[2], x.w - mean[3]);
                }
            }
        }
        poisoned = __any_sync(0xffffffffu, poisoned) != 0;
        attention_put_k(p, layout, step, i, poisoned, k);
        if constexpr (FULL) {
            attention_stage_v(p, codes + i * p.d, levels + i, poisoned, v);
        } else {
            attention_put_v(p, step + layout.v_at + i * p.d * 2, poisoned, v);
        }
    }
    if constexpr (FULL) {
        __syncthreads();
        attention_put_v_full(p, layout, step, codes, levels);
    }
}

// --- the mask: which tiles a block of rows needs. A warp per (stream, block, tile) in a grid-stride loop ---

static __global__ void __launch_bounds__(attention_prepare_threads) attention_visible_kernel(attention_prefill p) {
    const int     lane    = int(threadIdx.x % 32);
    const int64_t n_items = p.n_mask_streams * p.n_blocks * p.n_tiles;
    const int64_t step    = int64_t(gridDim.x) * (blockDim.x / 32);
    for (int64_t i = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32; i < n_items; i += step) {
        const int tile = int(i % p.n_tiles), block = int(i / p.n_tiles % p.n_blocks);
        const int first  = block * attention_block_rows / p.gqa;
        const int last   = min(p.n_rows - 1, (block + 1) * attention_block_rows - 1) / p.gqa;
        bool      hidden = false, plain = false, shifted = false;
        for (int query = first; query <= last && !shifted && !(hidden && plain); query++) {
            const half * row         = reinterpret_cast<const half *>(p.mask.data + query * p.mask.nb1 +
                                                                      i / p.n_tiles / p.n_blocks * p.mask.nb3);
            bool         lane_hidden = false, lane_plain = false, lane_shifted = false;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int   token = tile * attention_tile + lane + 32 * j;
                const float x     = token < p.n_kv ? __half2float(row[token]) : -INFINITY;
                lane_hidden       = lane_hidden || x == -INFINITY;
                lane_plain        = lane_plain || x == 0.0f;
                lane_shifted      = lane_shifted || !(x == 0.0f || x == -INFINITY);
            }
            hidden  = hidden || __any_sync(0xffffffffu, lane_hidden);
            plain   = plain || __any_sync(0xffffffffu, lane_plain);
            shifted = shifted || __any_sync(0xffffffffu, lane_shifted);
        }
        if (lane == 0) {
            p.visible[i] = shifted || (hidden && plain) ? ATTENTION_MIXED :
                           hidden                       ? ATTENTION_HIDDEN :
                                                          ATTENTION_VISIBLE;
        }
    }
}

}  // namespace ggml_ext
