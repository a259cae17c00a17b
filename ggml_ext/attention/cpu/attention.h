// GGML_OP_FLASH_ATTN_EXT over a quantised cache, in 8-bit integers, in place of upstream's code. docs/attention.md
// gives the mathematics and the measurements.
//
// Queries become int8 with one scale per row (token and head), which holds the softmax scale and log2(e): logits are
// in units of log2. K and V keep their codes. A tile of 64 cache tokens of one kv head is decoded once and then
// multiplied with a block of rows: all heads that share the kv head times up to ROWS_PER_BLOCK / heads tokens.

#ifndef GGML_EXT_ATTENTION_CPU_H
#define GGML_EXT_ATTENTION_CPU_H

#include "attention/setting.h"
#include "ggml.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define GGML_EXT_ATTENTION_TILE   64  // cache tokens per tile
#define GGML_EXT_ATTENTION_GROUP  32  // codes per block of every quantised cache type
#define GGML_EXT_ATTENTION_BATCH  4   // rows per call of a kernel
#define GGML_EXT_ATTENTION_PLANES 2   // at most

// K or V of one tile, decoded. Heads are padded with zero codes to a multiple of 32. All arrays are 64-byte aligned.
//
// Tokens beyond the end of the cache have scale 0. A quad of V is four tokens; quad j holds the tokens
// 16 (j mod 4) + 4 (j / 4) + 0 .. 3, the order in which AVX-512 packs 64 weights to bytes.
struct ggml_ext_attention_tile {
    uint8_t * k;         // [dk_pad / 4][64 tokens][4], code + 128
    float *   k_scale;   // [k_groups][64 tokens]
    float *   k_mean;    // [dk_pad], what smoothing took off the tile's K; NULL without smoothing
    int8_t *  v;         // [16 quads][dv_pad][4 tokens]; negated where the token's scale is negative
    float *   v_level;   // [v_groups][64 tokens], |scale| / max |scale of the group| * levels
    float *   v_unit;    // [v_groups], max |scale of the group| / levels
    int8_t *  staging;   // [64 tokens][max(dk_pad, dv_pad)], for types that the path does not decode itself
    float *   floats;    // [64 tokens][max(dk_pad, dv_pad)], for f16
    uint64_t  poisoned;  // bit t: token t has a scale that is NaN or Inf in K or V, which the arrays hold as 0
};

// A batch of 1 .. 4 rows. Arrays of a batch have room for 4 rows whatever n_rows is.
struct ggml_ext_attention_rows {
    int                         n_rows;
    const int8_t *              q;        // [4][dk_pad]
    const int32_t *             q_start;  // [4][k_groups], -128 * sum of the group's codes: undoes the + 128 of K
    const float *               q_scale;  // [4]
    const float *               q_bias;   // [4], added to the logits (smoothing: q . k_mean); NULL for 0
    float *                     s;        // [4][64], logits
    const ggml_fp16_t * const * mask;     // [4], each NULL or n values, added times slope
    const float *               slope;    // [4], in units of log2
    uint8_t *                   p;        // [4][v_groups][planes][16 quads][4 tokens], weights
    float *                     max;      // [4], running maximum of the logits, -inf at first
    float *                     sum;      // [4][16], partial sums of exp2(s - max)
    float *                     alpha;    // [4], exp2(old max - new max)
    float *                     gamma;    // [4], exp2(tile's max - new max)
    float *                     o;        // [4][dv_pad], sum of weight * V, relative to max
};

struct ggml_ext_attention_dims {
    int dk_pad, dv_pad;
    int k_groups, v_groups;  // scales per token: one per 32 codes, or a single one
    int planes;              // 1 full, 2 half
};

// Kernels of one instruction set. Integer sums stay in int32: a K group has at most 1024 codes, |q| <= 127 and
// k + 128 <= 255, hence < 2^25; V has 64 tokens, |v| <= 128 and weights <= 255 a plane, hence < 2^21, times 257 for
// two planes. Sums of quantised types are below 2^24 and so exact as floats.
struct ggml_ext_attention_path {
    const char * name;
    bool (*available)(void);
    // Largest |x| / 127 as the scale, codes rounded to nearest even; n_pad - n zero codes follow. Where 127 / largest |x|
    // overflows, all codes and the scale are 0; where an x is NaN or Inf, all codes are 0 and the scale is NaN.
    float (*quantize)(int n, int n_pad, const float * x, int8_t * codes);
    // The f16 scales that start a row's blocks, block_size bytes apart. out [n_blocks][64 tokens]
    void (*scales)(int n_blocks, size_t block_size, const char * const * rows, float * out);
    // Per group: unit = max |scale| / n_levels, scale = |scale| / unit, negate = -1 where scale was negative, else 0.
    // scale [n_groups][64]. Returns whether any was negative.
    bool (*levels)(int n_groups, float n_levels, float * scale, float * unit, int8_t * negate);
    // Codes of 64 tokens into the tile's layout. rows: the tokens' first blocks, for GGML_TYPE_I8 bare codes.
    // Types: Q8_0, Q4_0, IQ4_NL, I8. n_blocks of 32 codes. negate: 64 bytes per block, 0 or -1, or NULL.
    void (*pack_k)(enum ggml_type type, const char * const * rows, int n_blocks, uint8_t * k);
    void (*pack_v)(enum ggml_type type, const char * const * rows, int n_blocks, const int8_t * negate, int8_t * v);
    // s = (sum over groups of k_scale * (q . k)) * q_scale + q_bias
    void (*scores)(const struct ggml_ext_attention_dims * dims, const struct ggml_ext_attention_tile * tile,
                   const struct ggml_ext_attention_rows * rows);
    // s = cap * tanh(s) of n values, n a multiple of 64, s 64-byte aligned
    void (*softcap)(int n, float cap, float * s);
    // Softmax of s over the tile's first n tokens: max, sum, alpha, gamma, and p = round(exp2(s - tile's max) * v_level)
    void (*weights)(const struct ggml_ext_attention_dims * dims, const struct ggml_ext_attention_tile * tile, int n,
                    const struct ggml_ext_attention_rows * rows);
    // o = o * alpha + (p . v) * gamma * v_unit
    void (*accumulate)(const struct ggml_ext_attention_dims * dims, const struct ggml_ext_attention_tile * tile,
                       const struct ggml_ext_attention_rows * rows);
};

// Fastest first; the last is the generic path, plain C, which is always available and the reference of the others.
GGML_API const struct ggml_ext_attention_path * const ggml_ext_attention_paths[];
GGML_API const int                                    ggml_ext_attention_n_paths;

// The first available one, without those that ggml_ext_attention_skip leaves out.
GGML_API const struct ggml_ext_attention_path * ggml_ext_attention_fastest(void);

// For tests and measurements: leaves the first n_paths of the table out. Not between the planning and the end of a graph.
GGML_API void ggml_ext_attention_skip(int n_paths);

extern const struct ggml_ext_attention_path ggml_ext_attention_generic;
extern const struct ggml_ext_attention_path ggml_ext_attention_avx512;
extern const struct ggml_ext_attention_path ggml_ext_attention_avx2;

// Where block g of a row of quantised codes keeps them: 32 bytes, or 16 bytes of nibbles, low ones first, with a table.
// Types as pack_k has them.
struct ggml_ext_attention_source {
    size_t stride, offset;
    bool   nibbles;
    int8_t table[16];
};

struct ggml_ext_attention_source ggml_ext_attention_source_of(enum ggml_type type);

bool ggml_ext_attention_all_finite(int n, const float * x);

// Decodes n tokens, stride bytes apart, of a cache of head size d into the tile. levels: 255 or 65535. load_k starts
// the tile's `poisoned`, load_v adds to it.
GGML_API void ggml_ext_attention_load_k(const struct ggml_ext_attention_path * path, enum ggml_type type, int d, int n,
                                        const char * rows, size_t stride, struct ggml_ext_attention_tile * tile);
GGML_API void ggml_ext_attention_load_v(const struct ggml_ext_attention_path * path, enum ggml_type type, int d, int n,
                                        const char * rows, size_t stride, float levels,
                                        struct ggml_ext_attention_tile * tile);

// exp2(x) as 2^round(x) times a polynomial of degree 5 in x - round(x), coefficients of x^5 .. x^1 (and 1): relative
// error below 2e-7; exactly 1 at 0; 0 below -150.
#define GGML_EXT_EXP2_C5  0x1.5bba14p-10f
#define GGML_EXT_EXP2_C4  0x1.3cea88p-7f
#define GGML_EXT_EXP2_C3  0x1.c6b752p-5f
#define GGML_EXT_EXP2_C2  0x1.ebf9bcp-3f
#define GGML_EXT_EXP2_C1  0x1.62e42ap-1f
#define GGML_EXT_EXP2_MIN -150.0f

#ifdef __cplusplus
}
#endif

#endif  // GGML_EXT_ATTENTION_CPU_H
