// GPTQ onto FQ4, with the scale and the table rows chosen jointly with the codes, see ggml-ext.h.

#include "fq4.h"
#include "ggml-ext.h"
#include "ggml-impl.h"
#include "rounding/rounding.h"
#include "scale.h"

#include <string.h>

// First guesses of d, as d = factor * absmax / 127, then refits. docs/rounding.md, "candidates".
static const float factors[] = { 0.80f, 0.90f, 0.95f, 1.00f, 1.05f, 1.10f, 1.15f, 1.20f, 1.30f, 1.40f };
#define N_FACTORS ((int) (sizeof(factors) / sizeof(factors[0])))
#define N_REFITS  2

// One lane per row of the table (GCC and Clang vector extensions; without the hardware, plain code).
typedef float   f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));

// The table turned on its side: for each code, the values of the 16 rows.
struct fq4_gptq_row_tables {
    f32x16 value[16];
    f32x16 step[15];    // value[i + 1] - value[i]
    f32x16 middle[15];  // (value[i] + value[i + 1]) / 2
};

struct fq4_gptq_choice {
    float   d;  // a value that fp16 represents; 0: nothing chosen
    float   cost;
    float   err[QK_FQ4];
    float   value[QK_FQ4];  // of the table, so that the weight is d * value
    uint8_t row[16];
};

// v = the table values nearest to t, row by row. By pointer: vectors by value would change the calling convention.
static inline __attribute__((always_inline)) void fq4_gptq_nearest_values(const struct fq4_gptq_row_tables * tables,
                                                                          const f32x16 * t, f32x16 * v) {
    *v = tables->value[0];
    for (int i = 0; i < 15; i++) {
        *v += (f32x16) ((i32x16) tables->step[i] & (*t > tables->middle[i]));
    }
}

// One sub-block, the 16 table rows side by side. x: the sub-block's weights; u: from its first diagonal element
// on, rows of QK_FQ4. Leaves the best row's errors and values.
static inline __attribute__((always_inline)) float fq4_gptq_round_sub_block(const struct fq4_gptq_row_tables * tables,
                                                                            const float * x, const float * u, float d,
                                                                            float * err, float * value, uint8_t * row) {
    const float inv = 1.0f / d;
    f32x16      t[16];
    f32x16      e[16];
    f32x16      v[16];
    f32x16      cost = { 0.0f };
    for (int j = 0; j < 16; j++) {
        t[j] = x[j] - (f32x16) { 0.0f };
    }
    for (int j = 0; j < 16; j++) {
        const f32x16 scaled = t[j] * inv;
        fq4_gptq_nearest_values(tables, &scaled, &v[j]);
        e[j] = (t[j] - d * v[j]) * (1.0f / u[j * QK_FQ4 + j]);
        cost += e[j] * e[j];
        for (int k = j + 1; k < 16; k++) {
            t[k] -= e[j] * u[j * QK_FQ4 + k];
        }
    }
    int best = 0;
    for (int r = 1; r < 16; r++) {
        best = cost[r] < cost[best] ? r : best;
    }
    for (int j = 0; j < 16; j++) {
        err[j]   = e[j][best];
        value[j] = v[j][best];
    }
    *row = (uint8_t) best;
    return cost[best];
}

// All sub-blocks for a given d; gives up when the cost passes the best so far.
GGML_EXT_CLONES static void fq4_gptq_try_scale(const struct fq4_gptq_row_tables * tables, const float * w,
                                               const float * u, float d, struct fq4_gptq_choice * next, float limit) {
    float x[QK_FQ4];
    memcpy(x, w, sizeof(x));
    next->d    = d;
    next->cost = 0.0f;
    for (int b = 0; b < 16; b++) {
        const int first = 16 * b;
        next->cost += fq4_gptq_round_sub_block(tables, x + first, u + first * QK_FQ4 + first, d, next->err + first,
                                               next->value + first, next->row + b);
        if (!(next->cost < limit)) {
            return;
        }
        for (int j = first; j < first + 16; j++) {
            const float   e  = next->err[j];
            const float * uj = u + j * QK_FQ4;
            for (int k = first + 16; k < QK_FQ4; k++) {
                x[k] -= e * uj[k];
            }
        }
    }
}

// e = (w - d v) U^-1 for the chosen values v: the d that minimises |e|^2 is <w U^-1, v U^-1> / |v U^-1|^2.
GGML_EXT_CLONES static float fq4_gptq_refit_scale(const float * w, const float * u_inv,
                                                  const struct fq4_gptq_choice * choice) {
    float a[QK_FQ4] = { 0.0f };
    float b[QK_FQ4] = { 0.0f };
    for (int j = 0; j < QK_FQ4; j++) {
        const float * row = u_inv + j * QK_FQ4;
        for (int k = j; k < QK_FQ4; k++) {
            a[k] += w[j] * row[k];
            b[k] += choice->value[j] * row[k];
        }
    }
    float num = 0.0f;
    float den = 0.0f;
    for (int k = 0; k < QK_FQ4; k++) {
        num += a[k] * b[k];
        den += b[k] * b[k];
    }
    return den > 0.0f ? num / den : 0.0f;
}

static void fq4_gptq_keep_better(const struct fq4_gptq_row_tables * tables, const float * w, const float * u, float d,
                                 struct fq4_gptq_choice * best) {
    struct fq4_gptq_choice next;
    d = ggml_ext_fq4_round_d(d);
    if (d > 0.0f) {
        fq4_gptq_try_scale(tables, w, u, d, &next, best->cost);
        if (next.cost < best->cost) {
            *best = next;
        }
    }
}

static void fq4_gptq_fill_tables(struct fq4_gptq_row_tables * tables) {
    for (int r = 0; r < 16; r++) {
        for (int i = 0; i < 16; i++) {
            tables->value[i][r] = (float) ggml_ext_fq4_table[r][i];
        }
        for (int i = 0; i < 15; i++) {
            tables->step[i][r]   = tables->value[i + 1][r] - tables->value[i][r];
            tables->middle[i][r] = 0.5f * (tables->value[i + 1][r] + tables->value[i][r]);
        }
    }
}

static uint8_t fq4_gptq_code_of(const struct fq4_gptq_choice * choice, int i) {
    const int8_t * values = ggml_ext_fq4_table[choice->row[i / 16]];
    uint8_t        code   = 0;
    while ((float) values[code] < choice->value[i]) {
        code++;
    }
    return code;
}

static void fq4_gptq_pack(const struct fq4_gptq_choice * choice, ggml_ext_block_fq4 * block) {
    block->d = GGML_FP32_TO_FP16(choice->d);
    for (int i = 0; i < 8; i++) {
        block->s[i] = (uint8_t) (choice->row[2 * i] | choice->row[2 * i + 1] << 4);
    }
    for (int h = 0; h < 2; h++) {
        for (int j = 0; j < 64; j++) {
            block->q[64 * h + j] =
                (uint8_t) (fq4_gptq_code_of(choice, 128 * h + j) | fq4_gptq_code_of(choice, 128 * h + 64 + j) << 4);
        }
    }
}

int32_t ggml_ext_gptq_fq4(int64_t nrows, const float * w, const float * u, const float * u_inv, void * dst,
                          int64_t stride, float * err, float * cost) {
    if (nrows < 0 || stride < (int64_t) sizeof(ggml_ext_block_fq4) || stride % 2 != 0) {
        return GGML_EXT_E_SHAPE;
    }
    struct fq4_gptq_row_tables tables;
    fq4_gptq_fill_tables(&tables);
    for (int64_t row = 0; row < nrows; row++) {
        const float * x    = w + row * QK_FQ4;
        float         amax = 0.0f;
        for (int j = 0; j < QK_FQ4; j++) {
            const float a = fabsf(x[j]);
            if (!(a <= GGML_EXT_FQ4_MAX_WEIGHT)) {
                return GGML_EXT_E_FINITE;
            }
            amax = a > amax ? a : amax;
        }
        // A block of zeros, or of weights too small for any d, keeps d = 0 and passes no error on.
        struct fq4_gptq_choice best = { .cost = INFINITY };
        for (int k = 0; k < N_FACTORS; k++) {
            fq4_gptq_keep_better(&tables, x, u, amax * (factors[k] / 127.0f), &best);
        }
        for (int k = 0; k < N_REFITS && best.d > 0.0f; k++) {
            fq4_gptq_keep_better(&tables, x, u, fq4_gptq_refit_scale(x, u_inv, &best), &best);
        }
        if (!(best.d > 0.0f)) {
            // A candidate that lost to nothing had a cost beyond a float, or NaN: zeros would be wrong.
            if (ggml_ext_fq4_round_d(amax * (factors[N_FACTORS - 1] / 127.0f)) > 0.0f) {
                return GGML_EXT_E_FINITE;
            }
            best.cost = 0.0f;
        }
        fq4_gptq_pack(&best, (ggml_ext_block_fq4 *) ((char *) dst + row * stride));
        memcpy(err + row * QK_FQ4, best.err, sizeof(best.err));
        cost[row] = best.cost;
    }
    return 0;
}
