// What one warp does in cuda/attention/decode/decode.cuh: rows of queries, 16 tokens of the cache at a time.
//
//   logits   S[16 tokens][8 rows] = K Q: K's codes are the operand a of mma_s8, 32 channels = one block of the cache at
//            a time, whose sums of integers times the block's scale are added in float. Q is int8, one scale per row.
//   weights  P = exp2(S - top), f16. `top` follows the maximum only when that grows by more than 8.
//   sums     O[dim][8 rows] += V P: V's values, decoded to f16 with their scales, are the operand a of mma_f16.
//
// Lane l is g = l / 4, t = l % 4 as in device.cuh: of S it has tokens g and g + 8 of rows 2 t and 2 t + 1, of O
// channels of the same rows.

#pragma once

#include "attention/logits.cuh"
#include "cache.cuh"

namespace ggml_ext {

// What a block works on.
struct decode_place {
    int head, stream, first_row, n_rows, first, end;  // head: of K and V; rows and tokens: from first to before end
    int chunk;

    const __device__ __forceinline__ char * k(const attention_decode_args & args) const {
        return args.k + stream * args.nb_k[3] + head * args.nb_k[2];
    }
    const __device__ __forceinline__ char * v(const attention_decode_args & args) const {
        return args.v + stream * args.nb_v[3] + head * args.nb_v[2];
    }
};

static __device__ __forceinline__ decode_place decode_where(const attention_decode_args & args, int rows_per_block) {
    decode_place   p;
    const unsigned rest = blockIdx.x / args.heads_kv;
    p.head              = int(blockIdx.x % args.heads_kv);  // neighbours in the grid read neighbours in memory
    p.stream            = int(blockIdx.y);
    p.first_row         = int(rest % args.n_row_blocks) * rows_per_block;
    p.n_rows            = min(rows_per_block, args.gqa * args.n_q - p.first_row);
    p.chunk             = int(rest / args.n_row_blocks);
    p.first             = p.chunk * args.chunk_tokens;
    p.end               = min(args.n_kv, p.first + args.chunk_tokens);
    return p;
}

// The row of the result that row i of the block becomes.
static __device__ __forceinline__ int64_t decode_out_row(const attention_decode_args & args, const decode_place & p,
                                                         int i) {
    const int row = p.first_row + i, query = row / args.gqa;
    return (int64_t(p.stream) * args.n_q + query) * args.heads_kv * args.gqa + p.head * args.gqa + row % args.gqa;
}

// One warp makes int8 codes of row i of the block, the factor from sums of code products to logits in base 2 (with a
// softcap: to its tanh's argument), and the slope of its mask in base 2. A row with a NaN or Inf has the factor NaN;
// one below 1e-30 counts as zeros.
template <class K>
__device__ __forceinline__ void decode_quantize(const attention_decode_args & args, const decode_place & p, int i,
                                                int8_t * codes, float * factor, float * slope) {
    const int lane = int(threadIdx.x % 32), row = p.first_row + i;
    float     x[K::dim / 32], largest = 0.0f, poisoned = 0.0f;
    if (i < p.n_rows) {
        const char * from = args.q + row / args.gqa * args.nb_q[1] +
                            (p.head * args.gqa + row % args.gqa) * args.nb_q[2] + p.stream * args.nb_q[3];
#pragma unroll
        for (int j = 0; j < K::dim / 32; j++) {
            x[j]     = reinterpret_cast<const float *>(from)[lane + 32 * j];
            largest  = fmaxf(largest, fabsf(x[j]));
            poisoned = fmaf(x[j], 0.0f, poisoned);
        }
    } else {
#pragma unroll
        for (int j = 0; j < K::dim / 32; j++) {
            x[j] = 0.0f;
        }
    }
    largest             = warp_max(largest);
    poisoned            = warp_sum(poisoned);
    const float inverse = largest > 1e-30f ? 127.0f / largest : 0.0f;
#pragma unroll
    for (int j = 0; j < K::dim / 32; j++) {
        codes[lane + 32 * j] = int8_t(__float2int_rn(x[j] * inverse));
    }
    if (lane == 0) {
        const float unit = K::type == CACHE_Q8_0 ? 1.0f / 127.0f : 1.0f / (127.0f * 16.0f);
        *factor          = largest * unit * (args.softcap != 0.0f ? args.scale / args.softcap : args.scale * log2_e);
        *factor += poisoned;
        *slope = attention_slope(args.max_bias, args.heads_kv * args.gqa, p.head * args.gqa + row % args.gqa) * log2_e;
    }
}

// 16 tokens of one block of K as operand a of mma_s8: rows are tokens. q4_0's codes become 16 (code - 8).
template <class K>
__device__ __forceinline__ void decode_keys(uint32_t (&a)[4], const char * low, const char * high, int block, int t) {
    if constexpr (K::type == CACHE_Q8_0) {
        a[0] = cache_codes<K>(low, block, t);
        a[1] = cache_codes<K>(high, block, t);
        a[2] = cache_codes<K>(low, block, 4 + t);
        a[3] = cache_codes<K>(high, block, 4 + t);
    } else {
        const uint32_t x = cache_codes<K>(low, block, t), y = cache_codes<K>(high, block, t);
        a[0] = (x << 4 & 0xf0f0f0f0u) ^ 0x80808080u;
        a[1] = (y << 4 & 0xf0f0f0f0u) ^ 0x80808080u;
        a[2] = (x & 0xf0f0f0f0u) ^ 0x80808080u;
        a[3] = (y & 0xf0f0f0f0u) ^ 0x80808080u;
    }
}

template <class K, class V, int GROUPS> struct decode_warp {
    static constexpr int blocks = K::dim / 32;

    int      g, t;
    uint32_t q[GROUPS][blocks][2];  // operand b of mma_s8: columns are rows of the product
    float    o[GROUPS][2 * blocks]
           [4];                // channels of block b: [2 b] bytes 0 and 1 of the lane's word of V, [2 b + 1] 2 and 3
    float    top[GROUPS][2], total[GROUPS][2];
    unsigned mask[GROUPS][2];  // index of the row's first element

    __device__ __forceinline__ void begin(const attention_decode_args & args, const decode_place & p,
                                          const int8_t * codes) {
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
#pragma unroll
            for (int i = 0; i < 2 * blocks; i++) {
                const int      block = i / 2, half = i % 2;
                const int      word = K::type == CACHE_Q8_0 ? 4 * half + t : t;
                const int8_t * from =
                    codes + (8 * group + g) * K::dim + 32 * block + (K::type == CACHE_Q8_0 ? 0 : 16 * half);
                uint32_t bits = 0;
#pragma unroll
                for (int byte = 0; byte < 4; byte++) {
                    bits |= uint32_t(uint8_t(from[code_channel<K>(block, word, byte)])) << 8 * byte;
                }
                q[group][block][half] = bits;
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    o[group][i][j] = 0.0f;
                }
            }
#pragma unroll
            for (int c = 0; c < 2; c++) {
                // Rows that only fill up the group take the last one's mask.
                const int row   = p.first_row + min(8 * group + 2 * t + c, p.n_rows - 1);
                mask[group][c]  = unsigned((row / args.gqa * args.nb_mask[1] +
                                           (p.head * args.gqa + row % args.gqa) % args.mask_heads * args.nb_mask[2] +
                                           p.stream % args.mask_streams * args.nb_mask[3]) /
                                          int64_t(sizeof(__half)));
                top[group][c]   = -INFINITY;
                total[group][c] = 0.0f;
            }
        }
    }

    // The mask of the 16 tokens from `first` on for this lane's S; -inf from `end` on. from: null without a mask.
    __device__ __forceinline__ void load_mask(__half (&m)[GROUPS][4], const char * from, int first, int end) const {
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int token = first + g + i / 2 * 8;
                m[group][i]     = __ushort_as_half(token < end ? 0 : 0xfc00);
                if (token < end && from) {
                    m[group][i] = reinterpret_cast<const __half *>(from)[mask[group][i % 2] + unsigned(token)];
                }
            }
        }
    }

    // s = codes of K times codes of Q, times K's scales. Sums of integers start from magic_bits:
    // |sum| <= 32 * 128 * 127 < 2^22.
    __device__ __forceinline__ void products(float (&s)[GROUPS][4], const char * low, const char * high) const {
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s[group][i] = 0.0f;
            }
        }
#pragma unroll
        for (int block = 0; block < blocks; block++) {
            uint32_t a[4];
            decode_keys<K>(a, low, high, block, t);
            const float scales[2] = { cache_scale_float<K>(low, block), cache_scale_float<K>(high, block) };
#pragma unroll
            for (int group = 0; group < GROUPS; group++) {
                int32_t sum[4] = { magic_bits, magic_bits, magic_bits, magic_bits };
                mma_s8(sum, a, q[group][block]);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    s[group][i] = fmaf(__int_as_float(sum[i]) - magic, scales[i / 2], s[group][i]);
                }
            }
        }
    }

    // Logits in base 2. One that is not finite becomes NaN, unless the mask hides its token.
    __device__ __forceinline__ void logits(float (&s)[GROUPS][4], const __half (&m)[GROUPS][4], float softcap,
                                           const float * factors, const float * slopes) const {
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
            const float2 factor = reinterpret_cast<const float2 *>(factors + 8 * group)[t];
            const float2 slope  = reinterpret_cast<const float2 *>(slopes + 8 * group)[t];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float x = s[group][i] * (i % 2 ? factor.y : factor.x);
                x       = fmaf(x, 0.0f, x);
                if (softcap != 0.0f) {
                    x = attention_softcap(softcap, x);
                }
                const float shift = __half2float(m[group][i]);
                s[group][i]       = shift == -INFINITY ? -INFINITY : fmaf(i % 2 ? slope.y : slope.x, shift, x);
            }
        }
    }

    // Makes `top` the maximum so far where that is more than 8 above it, and scales what was summed.
    __device__ __forceinline__ void rescale_online_softmax(const float (&s)[GROUPS][4]) {
        bool higher = false;
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
#pragma unroll
            for (int c = 0; c < 2; c++) {
                higher |= fmaxf(s[group][c], s[group][c + 2]) > top[group][c] + 8.0f;
            }
        }
        if (!__any_sync(0xffffffffu, higher)) {
            return;
        }
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
#pragma unroll
            for (int c = 0; c < 2; c++) {
                float now = fmaxf(top[group][c], fmaxf(s[group][c], s[group][c + 2]));
#pragma unroll
                for (int offset = 4; offset < 32; offset *= 2) {
                    now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, offset));
                }
                const float shrink = now == -INFINITY ? 1.0f : exp2_approx(top[group][c] - now);
                top[group][c]      = now;
                total[group][c] *= shrink;
#pragma unroll
                for (int i = 0; i < 2 * blocks; i++) {
                    o[group][i][c] *= shrink;
                    o[group][i][c + 2] *= shrink;
                }
            }
        }
    }

    // p[group]: operand b of mma_f16, columns are rows of the product, k the 16 tokens.
    __device__ __forceinline__ void weights(uint32_t (&p)[GROUPS][2], const float (&s)[GROUPS][4]) {
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
            float w[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float from = top[group][i % 2];
                w[i]             = exp2_approx(s[group][i] - (from == -INFINITY ? 0.0f : from));
                total[group][i % 2] += w[i];
            }
            p[group][0] = move_matrix_trans(half2_bits(__floats2half2_rn(w[0], w[1])));
            p[group][1] = move_matrix_trans(half2_bits(__floats2half2_rn(w[2], w[3])));
        }
    }

    // A scale of V that is NaN or Inf would poison all rows through 0 * NaN. It becomes 0, and the rows whose mask shows
    // the token NaN. low, high: rows of V, tokens g and g + 8, the warp's own.
    __device__ __forceinline__ void zero_nonfinite_v(const float (&s)[GROUPS][4], char * low, char * high) {
        char * const mine     = t % 2 ? high : low;  // of the two rows lane t looks at the blocks t / 2, t / 2 + 2, ...
        bool         poisoned = false;
#pragma unroll
        for (int block = 0; block < blocks; block += 2) {
            if (block + 1 < blocks || t < 2) {
                poisoned |= not_finite(scale_of(mine, block + t / 2));
            }
        }
        if (!__any_sync(0xffffffffu, poisoned)) {
            return;
        }
        const int      lane          = 4 * g + t;
        const unsigned low_poisoned  = __ballot_sync(0xffffffffu, poisoned && t % 2 == 0);
        const unsigned high_poisoned = __ballot_sync(0xffffffffu, poisoned && t % 2 == 1);
        for (int block = t / 2; block < blocks; block += 2) {
            uint16_t & scale = scale_of(mine, block);
            scale            = not_finite(scale) ? 0 : scale;
        }
        __syncwarp();
        const bool bad[2] = { (low_poisoned >> lane / 4 * 4 & 15) != 0, (high_poisoned >> lane / 4 * 4 & 15) != 0 };
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (bad[i / 2] && s[group][i] != -INFINITY) {
                    total[group][i % 2] = NAN;
                }
            }
        }
    }

    static __device__ __forceinline__ uint16_t & scale_of(char * row, int block) {
        return *reinterpret_cast<uint16_t *>(row + block * V::block_bytes);
    }

    static __device__ __forceinline__ bool not_finite(uint16_t half_bits) { return (half_bits & 0x7c00) == 0x7c00; }

    // rows: of V, the lane's tokens 2 t, 2 t + 1, 2 t + 8, 2 t + 9.
    __device__ __forceinline__ void values(const uint32_t (&p)[GROUPS][2], const char * const (&rows)[4]) {
        const int word   = V::type == CACHE_Q8_0 ? g : g % 4;
        const int nibble = g / 4 * 4;
#pragma unroll
        for (int block = 0; block < blocks; block++) {
            uint32_t pairs[2][4];
#pragma unroll
            for (int k = 0; k < 2; k++) {
                const char *a = rows[2 * k], *b = rows[2 * k + 1];
                cache_decode<V>(pairs[k], cache_codes<V>(a, block, word), cache_codes<V>(b, block, word),
                                cache_scales<V>(a, b, block), nibble);
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint32_t a[4] = { pairs[0][2 * i], pairs[0][2 * i + 1], pairs[1][2 * i], pairs[1][2 * i + 1] };
#pragma unroll
                for (int group = 0; group < GROUPS; group++) {
                    mma_f16(o[group][2 * block + i], a, p[group]);
                }
            }
        }
    }

    // The channel of o[.][i][j].
    __device__ __forceinline__ int channel(int i, int j) const {
        const int block = i / 2, byte = 2 * (i % 2) + j / 2;
        return V::type == CACHE_Q8_0 ? 32 * block + code_channel<V>(block, g, byte) :
                                       32 * block + g / 4 * 16 + code_channel<V>(block, g % 4, byte);
    }
};

}  // namespace ggml_ext
