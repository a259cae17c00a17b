// FQ4 inside ggml-cpu: products of rows with columns of int8 activations, one set of kernels per instruction set, and the
// choice between them, for FQ4 and its relatives (fq4_64/cpu, fq3/cpu, fq3_64/cpu). mul_mat.c drives them. The kernels
// of all types have common bodies (*_body.h), which a type's block.h tells its layout.
//
// All kernels accumulate in int32 over a block of at most 256 and so equal the reference exactly in their integer part:
// |T| <= 127 and |q| <= 127, hence a block's sum stays below 2^22. A kernel's result for one row and one column
// does not depend on the other rows and columns of the call.

#ifndef GGML_EXT_FQ4_CPU_H
#define GGML_EXT_FQ4_CPU_H

#include "fq4/fq4.h"

#include <stdalign.h>
#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

#define GGML_EXT_FQ4_MAX_COLS  8   // columns per call of a kernel
#define GGML_EXT_FQ4_TILE_ROWS 32  // rows of a tile

// 256 activations: x = d * q. The values are those of upstream's Q8_K (quantize_row_q8_K_ref), without its sums per
// 16, of which these kernels need none. Aligned so that no load of q crosses a cache line.
struct ggml_ext_fq4_act {
    alignas(64) int8_t q[QK_FQ4];
    float   d;      // largest |x| / 127; NaN if an x is NaN or infinite
    int32_t start;  // -128 times the sum of q: where a sum starts whose weights are stored as T + 128
};

// One block of each of GGML_EXT_FQ4_TILE_ROWS rows, decoded to bytes in the path's own layout.
struct ggml_ext_fq4_tile {
    alignas(64) uint8_t w[GGML_EXT_FQ4_TILE_ROWS * QK_FQ4];
    float d[GGML_EXT_FQ4_TILE_ROWS];  // the blocks' scales
};

// The kernels of one type. Activations and tiles are the type's own structs, FQ4's the ones above.
struct ggml_ext_fq4_path {
    const char * name;
    bool (*available)(void);
    // k floats (a multiple of the block) to activations. All paths give the same bits.
    void (*quantize)(int64_t k, const float * x, void * y);
    // n_rows rows of n_blocks blocks, row_size bytes apart, times n_cols (1 .. GGML_EXT_FQ4_MAX_COLS) columns:
    // out[c][r] for column c and row r. Reads the weights as one stream.
    void (*dots)(int n_rows, int n_blocks, const void * x, size_t row_size, int n_cols, const void * const * y,
                 float * const * out);
    // Decodes one block of n_rows (1 .. GGML_EXT_FQ4_TILE_ROWS) rows, row_size bytes apart; the other rows become
    // zero weights.
    void (*decode)(int n_rows, const void * x, size_t row_size, void * tile);
    // acc[c * GGML_EXT_FQ4_TILE_ROWS + r] += the tile's row r times the block y[c], for n_cols
    // (1 .. GGML_EXT_FQ4_MAX_COLS) columns. acc: 64-byte aligned.
    void (*multiply)(const void * tile, int n_cols, const void * const * y, float * acc);
};

// A type and its kernels.
struct ggml_ext_fq4_kind {
    enum ggml_type type;
    int            block;       // weights
    size_t         block_size;  // bytes
    size_t         act_size;    // bytes of a block's activations; a tile is no larger than FQ4's
    // Fastest first; the last entry is the generic path, plain C, which is always available. The same instruction sets
    // for all types.
    const struct ggml_ext_fq4_path * const * paths;
    int                                      n_paths;
};

GGML_API const struct ggml_ext_fq4_kind ggml_ext_fq4_kernels;

// NULL for a type without such kernels.
GGML_API const struct ggml_ext_fq4_kind * ggml_ext_fq4_kind_of(enum ggml_type type);

// The fastest available path.
GGML_API const struct ggml_ext_fq4_path * ggml_ext_fq4_fastest(const struct ggml_ext_fq4_kind * kind);

// The fastest path's product of one row of n weights, of a type with blocks of 256, and one column of Q8_K.
GGML_API float ggml_ext_fq4_dot_q8_k(const struct ggml_ext_fq4_kind * kind, int n, const void * vx, const void * vy);

// FQ4's as a ggml_vec_dot_t for the type traits (nrc 1).
GGML_API void ggml_ext_fq4_dot(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by,
                               int nrc);

#ifdef __cplusplus
}
#endif

#endif  // GGML_EXT_FQ4_CPU_H
