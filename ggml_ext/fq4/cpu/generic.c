// FQ4 products in plain C: the reference of the SIMD paths, and what runs where there is none.
//
// Tile: w[r * 256 + i] is weight i of row r, as int8.

#include "core/cpu/generic.h"

#include "ggml-impl.h"
#include "paths.h"

#include <float.h>
#include <math.h>
#include <string.h>

static void fq4_quantize(int64_t k, const float * x, struct ggml_ext_fq4_act * y) {
    for (; k > 0; k -= QK_FQ4, x += QK_FQ4, y++) {
        float max    = 0.0f;
        bool  finite = true;
        for (int i = 0; i < QK_FQ4; i++) {
            const float v = fabsf(x[i]);
            finite        = finite && v <= FLT_MAX;
            max           = v > max ? v : max;
        }
        const float inv = 127.0f / max;
        y->start        = 0;
        if (!finite || !(inv <= FLT_MAX)) {  // numbers too small for a scale count as zeros
            y->d = finite ? 0.0f : NAN;
            memset(y->q, 0, sizeof(y->q));
            continue;
        }
        y->d = 1.0f / inv;
        for (int i = 0; i < QK_FQ4; i++) {
            y->q[i] = (int8_t) lrintf(x[i] * inv);
            y->start -= 128 * y->q[i];
        }
    }
}

static void fq4_decode_row(const ggml_ext_block_fq4 * x, int8_t * w) {
    for (int i = 0; i < QK_FQ4; i++) {
        const int b    = i / QK_FQ4_SUB;
        const int row  = x->s[b / 2] >> 4 * (b % 2) & 15;
        const int code = x->q[64 * (i / 128) + i % 64] >> 4 * (i / 64 % 2) & 15;
        w[i]           = ggml_ext_fq4_table[row][code];
    }
}

static int32_t fq4_dot_block(const int8_t * w, const int8_t * q) {
    int32_t sum = 0;
    for (int i = 0; i < QK_FQ4; i++) {
        sum += w[i] * q[i];
    }
    return sum;
}

static void fq4_dots(int n_rows, int n_blocks, const void * x, size_t row_size, int n_cols,
                     const struct ggml_ext_fq4_act * const * y, float * const * out) {
    for (int r = 0; r < n_rows; r++) {
        const ggml_ext_block_fq4 * blocks                     = (const void *) ((const char *) x + r * row_size);
        float                      sum[GGML_EXT_FQ4_MAX_COLS] = { 0 };
        for (int ib = 0; ib < n_blocks; ib++) {
            int8_t      w[QK_FQ4];
            const float d = GGML_FP16_TO_FP32(blocks[ib].d);
            fq4_decode_row(blocks + ib, w);
            for (int c = 0; c < n_cols; c++) {
                sum[c] += d * y[c][ib].d * (float) fq4_dot_block(w, y[c][ib].q);
            }
        }
        for (int c = 0; c < n_cols; c++) {
            out[c][r] = sum[c];
        }
    }
}

static void fq4_decode(int n_rows, const void * x, size_t row_size, struct ggml_ext_fq4_tile * tile) {
    for (int r = 0; r < n_rows; r++) {
        const ggml_ext_block_fq4 * block = (const void *) ((const char *) x + r * row_size);
        fq4_decode_row(block, (int8_t *) tile->w + r * QK_FQ4);
        tile->d[r] = GGML_FP16_TO_FP32(block->d);
    }
    memset(tile->w + n_rows * QK_FQ4, 0, (GGML_EXT_FQ4_TILE_ROWS - n_rows) * QK_FQ4);
    memset(tile->d + n_rows, 0, (GGML_EXT_FQ4_TILE_ROWS - n_rows) * sizeof(float));
}

static void fq4_multiply(const struct ggml_ext_fq4_tile * tile, int n_cols, const struct ggml_ext_fq4_act * const * y,
                         float * acc) {
    for (int c = 0; c < n_cols; c++) {
        for (int r = 0; r < GGML_EXT_FQ4_TILE_ROWS; r++) {
            const int32_t sum = fq4_dot_block((const int8_t *) tile->w + r * QK_FQ4, y[c]->q);
            acc[c * GGML_EXT_FQ4_TILE_ROWS + r] += tile->d[r] * y[c]->d * (float) sum;
        }
    }
}

const struct ggml_ext_fq4_path ggml_ext_fq4_generic = { "generic", ggml_ext_always, fq4_quantize,
                                                        fq4_dots,  fq4_decode,      fq4_multiply };
