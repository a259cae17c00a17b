// Products for aarch64 with dot products of int8 (FEAT_DotProd, in most processors since armv8.2): the body of all types, after
// a type's block.h.
//
// Tile: 8 groups of 4 rows. In a group, vector k (0 .. FQ4_QK / 4 - 1) holds the weights 4 k .. 4 k + 3 of its rows as int8, one row
// to a lane: sdot by lane multiplies it with four activations of a column, and no sum crosses lanes.

#include "fq4/fq4.h"
#include "ggml-impl.h"

#include <arm_neon.h>
#include <float.h>
#include <math.h>
#include <string.h>

#ifdef __ARM_FEATURE_DOTPROD
#    define FQ4_TARGET
static bool fq4_available(void) {
    return true;
}
#else
#    include <sys/auxv.h>
#    define FQ4_TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
static bool fq4_available(void) {
    const unsigned long hwcap_asimddp = 1ul << 20;  // <asm/hwcap.h> of Linux
    return (getauxval(AT_HWCAP) & hwcap_asimddp) != 0;
}
#endif

#define FQ4_INLINE FQ4_TARGET static inline __attribute__((always_inline))

#define FQ4_VECTORS     (FQ4_QK / 16)  // of one row's block
#define FQ4_GROUP_BYTES (4 * FQ4_QK)   // of 4 rows' blocks

FQ4_TARGET static void fq4_quantize(int64_t k, const float * x, void * acts) {
    fq4_act * y = acts;
    for (; k > 0; k -= FQ4_QK, x += FQ4_QK, y++) {
        // Magnitudes as integers order like the floats, with Inf and NaN above all numbers.
        int32x4_t largest = vdupq_n_s32(0);
        for (int i = 0; i < FQ4_QK; i += 4) {
            largest = vmaxq_s32(largest, vreinterpretq_s32_f32(vabsq_f32(vld1q_f32(x + i))));
        }
        const int32_t bits   = vmaxvq_s32(largest);
        const bool    finite = bits < 0x7f800000;
        float         max;
        memcpy(&max, &bits, sizeof(max));
        const float inv = 127.0f / max;
        y->start        = 0;
        if (!finite || !(inv <= FLT_MAX)) {  // numbers too small for a scale count as zeros
            y->d = finite ? 0.0f : NAN;
            memset(y->q, 0, sizeof(y->q));
            continue;
        }
        int32x4_t sum = vdupq_n_s32(0);
        for (int i = 0; i < FQ4_QK; i += 16) {
            int16x4_t part[4];
            for (int j = 0; j < 4; j++) {
                part[j] = vmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i + 4 * j), inv)));
            }
            const int8x16_t q =
                vcombine_s8(vmovn_s16(vcombine_s16(part[0], part[1])), vmovn_s16(vcombine_s16(part[2], part[3])));
            vst1q_s8(y->q + i, q);
            sum = vdotq_s32(sum, q, vdupq_n_s8(1));
        }
        y->d     = 1.0f / inv;
        y->start = -128 * vaddvq_s32(sum);
    }
}

#ifdef FQ4_PLANES
#    include "fq3/cpu/neon_planes.h"
#else
// The codes of a block as nibbles: the low ones of vector i are FQ4_RUN / 16 vectors of weights in front of the high ones.
FQ4_INLINE void nibbles_of(const fq4_block * x, uint8x16_t q[FQ4_VECTORS / 2]) {
    for (int i = 0; i < FQ4_VECTORS / 2; i++) {
        q[i] = vld1q_u8(x->q + 16 * i);
    }
}
#endif

// w[v]: the weights 16 v .. 16 v + 15, which share one row of the table.
FQ4_INLINE void decode_row(const fq4_block * x, int8x16_t w[FQ4_VECTORS]) {
    uint8x16_t q[FQ4_VECTORS / 2];
    nibbles_of(x, q);
    for (int i = 0; i < FQ4_VECTORS / 2; i++) {
        const int       run   = FQ4_RUN / 16;
        const int       v     = 2 * run * (i / run) + i % run;
        const int       shift = 4 * (v % 2);
        const int8x16_t low   = vld1q_s8(FQ4_ROWS[x->s[v / 2] >> shift & 15]);
        const int8x16_t high  = vld1q_s8(FQ4_ROWS[x->s[(v + run) / 2] >> shift & 15]);
        w[v]                  = vqtbl1q_s8(low, vandq_u8(q[i], vdupq_n_u8(15)));
        w[v + run]            = vqtbl1q_s8(high, vshrq_n_u8(q[i], 4));
    }
}

FQ4_INLINE void dots_row(int n_blocks, const fq4_block * x, int n_cols, const void * const * y, float * const * out,
                         int r) {
    float32x4_t acc[GGML_EXT_FQ4_MAX_COLS];
    for (int c = 0; c < n_cols; c++) {
        acc[c] = vdupq_n_f32(0.0f);
    }
    for (int ib = 0; ib < n_blocks; ib++) {
        int8x16_t   w[FQ4_VECTORS];
        const float d = FQ4_SCALE(x + ib, GGML_FP16_TO_FP32);
        decode_row(x + ib, w);
        for (int c = 0; c < n_cols; c++) {
            const fq4_act * act  = (const fq4_act *) y[c] + ib;
            int32x4_t       even = vdupq_n_s32(0);
            int32x4_t       odd  = vdupq_n_s32(0);
#pragma GCC unroll 8
            for (int v = 0; v < FQ4_VECTORS; v += 2) {
                even = vdotq_s32(even, w[v], vld1q_s8(act->q + 16 * v));
                odd  = vdotq_s32(odd, w[v + 1], vld1q_s8(act->q + 16 * v + 16));
            }
            acc[c] = vfmaq_n_f32(acc[c], vcvtq_f32_s32(vaddq_s32(even, odd)), d * act->d);
        }
    }
    for (int c = 0; c < n_cols; c++) {
        out[c][r] = vaddvq_f32(acc[c]);
    }
}

FQ4_TARGET static void fq4_dots(int n_rows, int n_blocks, const void * x, size_t row_size, int n_cols,
                                const void * const * y, float * const * out) {
    for (int r = 0; r < n_rows; r++) {
        dots_row(n_blocks, (const void *) ((const char *) x + r * row_size), n_cols, y, out, r);
    }
}

// in[r] holds 4 x 4 weights of row r; out[k] gets the k-th four of all rows.
FQ4_INLINE void transpose_4x4(int8x16_t r0, int8x16_t r1, int8x16_t r2, int8x16_t r3, uint8_t * out) {
    const int32x4_t lo02 = vzip1q_s32(vreinterpretq_s32_s8(r0), vreinterpretq_s32_s8(r2));
    const int32x4_t hi02 = vzip2q_s32(vreinterpretq_s32_s8(r0), vreinterpretq_s32_s8(r2));
    const int32x4_t lo13 = vzip1q_s32(vreinterpretq_s32_s8(r1), vreinterpretq_s32_s8(r3));
    const int32x4_t hi13 = vzip2q_s32(vreinterpretq_s32_s8(r1), vreinterpretq_s32_s8(r3));
    vst1q_u8(out, vreinterpretq_u8_s32(vzip1q_s32(lo02, lo13)));
    vst1q_u8(out + 16, vreinterpretq_u8_s32(vzip2q_s32(lo02, lo13)));
    vst1q_u8(out + 32, vreinterpretq_u8_s32(vzip1q_s32(hi02, hi13)));
    vst1q_u8(out + 48, vreinterpretq_u8_s32(vzip2q_s32(hi02, hi13)));
}

FQ4_TARGET static void fq4_decode(int n_rows, const void * x, size_t row_size, void * to) {
    fq4_tile * tile = to;
    for (int first = 0; first < GGML_EXT_FQ4_TILE_ROWS; first += 4) {
        int8x16_t w[4][FQ4_VECTORS];
        for (int r = 0; r < 4; r++) {
            const fq4_block * block = (const void *) ((const char *) x + (first + r) * row_size);
            if (first + r < n_rows) {
                decode_row(block, w[r]);
            } else {
                memset(w[r], 0, sizeof(w[r]));
            }
            tile->d[first + r] = first + r < n_rows ? FQ4_SCALE(block, GGML_FP16_TO_FP32) : 0.0f;
        }
        for (int v = 0; v < FQ4_VECTORS; v++) {
            transpose_4x4(w[0][v], w[1][v], w[2][v], w[3][v], tile->w + first * FQ4_QK + 64 * v);
        }
    }
}

// 8 rows by up to 8 columns: 16 sums in registers, and 16 activations of every column.
FQ4_INLINE void multiply_cols(const uint8_t * w, const float * d, const int n_cols, const void * const * y,
                              float * acc) {
    int32x4_t sum[2][GGML_EXT_FQ4_MAX_COLS];
#pragma GCC unroll 8
    for (int c = 0; c < n_cols; c++) {
        sum[0][c] = sum[1][c] = vdupq_n_s32(0);
    }
    for (int i = 0; i < FQ4_QK; i += 16) {
        int8x16_t q[GGML_EXT_FQ4_MAX_COLS];
#pragma GCC unroll 8
        for (int c = 0; c < n_cols; c++) {
            q[c] = vld1q_s8(((const fq4_act *) y[c])->q + i);
        }
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const uint8_t * group = w + half * FQ4_GROUP_BYTES + 4 * i;
            const int8x16_t w0    = vreinterpretq_s8_u8(vld1q_u8(group));
            const int8x16_t w1    = vreinterpretq_s8_u8(vld1q_u8(group + 16));
            const int8x16_t w2    = vreinterpretq_s8_u8(vld1q_u8(group + 32));
            const int8x16_t w3    = vreinterpretq_s8_u8(vld1q_u8(group + 48));
#pragma GCC unroll 8
            for (int c = 0; c < n_cols; c++) {
                sum[half][c] = vdotq_laneq_s32(sum[half][c], w0, q[c], 0);
                sum[half][c] = vdotq_laneq_s32(sum[half][c], w1, q[c], 1);
                sum[half][c] = vdotq_laneq_s32(sum[half][c], w2, q[c], 2);
                sum[half][c] = vdotq_laneq_s32(sum[half][c], w3, q[c], 3);
            }
        }
    }
#pragma GCC unroll 8
    for (int c = 0; c < n_cols; c++) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            float *           out   = acc + c * GGML_EXT_FQ4_TILE_ROWS + 4 * half;
            const float32x4_t scale = vmulq_n_f32(vld1q_f32(d + 4 * half), ((const fq4_act *) y[c])->d);
            vst1q_f32(out, vfmaq_f32(vld1q_f32(out), scale, vcvtq_f32_s32(sum[half][c])));
        }
    }
}

FQ4_TARGET static void fq4_multiply(const void * from, int n_cols, const void * const * y, float * acc) {
    const fq4_tile * tile = from;
    for (int row = 0; row < GGML_EXT_FQ4_TILE_ROWS; row += 8) {
        const uint8_t * w = tile->w + row * FQ4_QK;
        const float *   d = tile->d + row;
        switch (n_cols) {
            case 1:
                multiply_cols(w, d, 1, y, acc + row);
                break;
            case 2:
                multiply_cols(w, d, 2, y, acc + row);
                break;
            case 3:
                multiply_cols(w, d, 3, y, acc + row);
                break;
            case 4:
                multiply_cols(w, d, 4, y, acc + row);
                break;
            case 5:
                multiply_cols(w, d, 5, y, acc + row);
                break;
            case 6:
                multiply_cols(w, d, 6, y, acc + row);
                break;
            case 7:
                multiply_cols(w, d, 7, y, acc + row);
                break;
            case 8:
                multiply_cols(w, d, 8, y, acc + row);
                break;
        }
    }
}
