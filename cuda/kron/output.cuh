// GGML_EXT_OP_KRON on tensor cores: what happens to a token's results, which are spread over the block's registers.
// Included by kron.cuh.

#pragma once

namespace ggml_ext {

template <int NT, int UNITS> struct kron_output {
    const ggml_ext_kron_args &   args;
    const ggml_ext_kron_layout & layout;
    uint32_t *                   groups;  // one per 256 values: largest magnitude, then the inverse of the scale
    const kron_matrix &          x;       // shared memory that the codes go to
    kron_block_max               block_max;

    // Element (m, n) of the tile is Y[n][m] where TRANSPOSED, else Y[m][n].
    template <bool TRANSPOSED>
    __device__ __forceinline__ void finish(kron_tile<NT, UNITS> & tile, int tiles, float down, int64_t token) {
        const ggml_ext_kron_shape & s       = args.shape;
        const int                   rows    = TRANSPOSED ? s.n2 : s.n1;
        const int                   columns = TRANSPOSED ? s.n1 : s.n2;
        const int2                  step    = TRANSPOSED ? int2{ 1, s.n2 } : int2{ s.n2, 1 };
        const auto                  each    = [&](const auto & f) { tile.each(tiles, rows, columns, step, {}, f); };

        if (args.right.kind == GGML_EXT_KRON_HADAMARD) {
            down *= rsqrtf(float(s.n2));
        }
        each([&](int, int, float & y) { y *= down; });
        if (s.clip < 1.0f) {
            uint32_t largest = 0;  // a NaN counts for no maximum, an Inf does
            each([&](int, int, float & y) {
                const uint32_t bits = magnitude_bits(y);
                largest             = max(largest, bits <= 0x7f800000 ? bits : 0);
            });
            const float limit = s.clip * __uint_as_float(block_max(largest));
            each([&](int, int, float & y) { y = y < -limit ? -limit : y > limit ? limit : y; });
        }
        if (args.y) {
            float * to = args.y + token * s.n1 * s.n2;
            each([&](int i, int, float & y) { to[i] = y; });
        }
        if (args.codes) {
            quantize<TRANSPOSED>(tile, tiles, token);
        }
    }

    template <bool TRANSPOSED>
    __device__ __forceinline__ void quantize(kron_tile<NT, UNITS> & tile, int tiles, int64_t token) {
        const ggml_ext_kron_shape & s        = args.shape;
        const int                   n_groups = s.n1 * s.n2 / GGML_EXT_ACTIVATION_GROUP;
        for (int i = threadIdx.x; i < n_groups; i += blockDim.x) {
            groups[i] = 0;
        }
        __syncthreads();
        group_maxima<TRANSPOSED>(tile, tiles);
        __syncthreads();
        for (int i = threadIdx.x; i < n_groups; i += blockDim.x) {
            const activation_scale scale        = activation_scale_of(groups[i]);
            groups[i]                           = __float_as_uint(scale.inverse);
            args.scales[i * s.n_tokens + token] = scale.scale;
        }
        __syncthreads();
        // Row a of the codes over row a of Z, which nobody reads any more: its padding stays zero.
        uint8_t * codes = reinterpret_cast<uint8_t *>(x.values);
        const int row   = 2 * x.stride;
        tile.each(tiles, TRANSPOSED ? s.n2 : s.n1, TRANSPOSED ? s.n1 : s.n2,
                  TRANSPOSED ? int2{ 1, s.n2 } : int2{ s.n2, 1 }, TRANSPOSED ? int2{ 1, row } : int2{ row, 1 },
                  [&](int i, int j, float & y) {
                      codes[j] = activation_code(y, __uint_as_float(groups[i / GGML_EXT_ACTIVATION_GROUP]));
                  });
        __syncthreads();
        int4 *    to      = reinterpret_cast<int4 *>(args.codes + token * s.n1 * s.n2);
        const int per_row = s.n2 / 16;
        for (int i = threadIdx.x; i < s.n1 * per_row; i += blockDim.x) {
            const int a = i / per_row;
            to[i]       = reinterpret_cast<const int4 *>(codes + a * row)[i - a * per_row];
        }
    }

    // n2 % 16 == 0: the 16 values of a row that one unit holds (TRANSPOSED), and the 8 of a tile (else), are of one group.
    template <bool TRANSPOSED> __device__ __forceinline__ void group_maxima(kron_tile<NT, UNITS> & tile, int tiles) {
        const ggml_ext_kron_shape & s    = args.shape;
        const int                   self = tile.thread(), g = self % 32 / 4, t = self % 4;
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
            const int m0 = tile.unit(self, u) % tiles * 16, n0 = tile.unit(self, u) / tiles * (8 * NT);
#pragma unroll
            for (int i = 0; i < NT; i++) {
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const float (&d)[4] = tile.acc[u][i];
                    uint32_t largest    = TRANSPOSED ? max(magnitude_bits(d[h]), magnitude_bits(d[h + 2])) :
                                                       max(magnitude_bits(d[2 * h]), magnitude_bits(d[2 * h + 1]));
#pragma unroll
                    for (int offset = TRANSPOSED ? 4 : 1; offset < (TRANSPOSED ? 32 : 4); offset *= 2) {
                        largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
                    }
                    const int a = TRANSPOSED ? n0 + 8 * i + 2 * t + h : m0 + 8 * h + g;
                    const int b = TRANSPOSED ? m0 : n0 + 8 * i;
                    if ((TRANSPOSED ? g : t) == 0 && a < s.n1 && b < s.n2) {
                        atomicMax(&groups[(a * s.n2 + b) / GGML_EXT_ACTIVATION_GROUP], largest);
                    }
                }
            }
        }
    }
};

}  // namespace ggml_ext
