// Products in plain C: the reference of the SIMD paths, and what runs where there is none. The body of all types, after a
// type's block.h.
//
// Tile: w[r * FQ4_QK + i] is weight i of row r, as int8.

#include "core/cpu/generic.h"
#include "fq4/fq4.h"
#include "ggml-impl.h"

#include <float.h>
#include <math.h>
#include <string.h>

static void fq4_quantize(int64_t k, const float * x, void * acts) {
    fq4_act * y = acts;
    for (; k > 0; k -= FQ4_QK, x += FQ4_QK, y++) {
        float max    = 0.0f;
        bool  finite = true;
        for (int i = 0; i < FQ4_QK; i++) {
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
        for (int i = 0; i < FQ4_QK; i++) {
            y->q[i] = (int8_t) lrintf(x[i] * inv);
            y->start -= 128 * y->q[i];
        }
    }
}

static void fq4_decode_row(const fq4_block * x, int8_t * w) {
    for (int i = 0; i < FQ4_QK; i++) {
        const int b   = i / 16;
        const int row = x->s[b / 2] >> 4 * (b % 2) & 15;
        w[i]          = FQ4_TABLE[row][FQ4_CODE(x, i)];
    }
}

static int32_t fq4_dot_block(const int8_t * w, const int8_t * q) {
    int32_t sum = 0;
    for (int i = 0; i < FQ4_QK; i++) {
        sum += w[i] * q[i];
    }
    return sum;
}

static void fq4_dots(int n_rows, int n_blocks, const void * x, size_t row_size, int n_cols, const void * const * y,
                     float * const * out) {
    for (int r = 0; r < n_rows; r++) {
        const fq4_block * blocks                     = (const void *) ((const char *) x + r * row_size);
        float             sum[GGML_EXT_FQ4_MAX_COLS] = { 0 };
        for (int ib = 0; ib < n_blocks; ib++) {
            int8_t      w[FQ4_QK];
            const float d = FQ4_SCALE(blocks + ib, GGML_FP16_TO_FP32);
            fq4_decode_row(blocks + ib, w);
            for (int c = 0; c < n_cols; c++) {
                const fq4_act * act = (const fq4_act *) y[c] + ib;
                sum[c] += d * act->d * (float) fq4_dot_block(w, act->q);
            }
        }
        for (int c = 0; c < n_cols; c++) {
            out[c][r] = sum[c];
        }
    }
}

static void fq4_decode(int n_rows, const void * x, size_t row_size, void * to) {
    fq4_tile * tile = to;
    for (int r = 0; r < n_rows; r++) {
        const fq4_block * block = (const void *) ((const char *) x + r * row_size);
        fq4_decode_row(block, (int8_t *) tile->w + r * FQ4_QK);
        tile->d[r] = FQ4_SCALE(block, GGML_FP16_TO_FP32);
    }
    memset(tile->w + n_rows * FQ4_QK, 0, (GGML_EXT_FQ4_TILE_ROWS - n_rows) * FQ4_QK);
    memset(tile->d + n_rows, 0, (GGML_EXT_FQ4_TILE_ROWS - n_rows) * sizeof(float));
}

static void fq4_multiply(const void * from, int n_cols, const void * const * y, float * acc) {
    const fq4_tile * tile = from;
    for (int c = 0; c < n_cols; c++) {
        const fq4_act * act = y[c];
        for (int r = 0; r < GGML_EXT_FQ4_TILE_ROWS; r++) {
            const int32_t sum = fq4_dot_block((const int8_t *) tile->w + r * FQ4_QK, act->q);
            acc[c * GGML_EXT_FQ4_TILE_ROWS + r] += tile->d[r] * act->d * (float) sum;
        }
    }
}
