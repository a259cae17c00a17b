// GPTQ onto the types with FQ4's table, with the scale and the table rows chosen jointly with the codes, see
// ggml-ext.h. For one layout of blocks; the file that includes it defines, before:
//
//   FQ4_QK, FQ4_RUN, fq4_block   the layout, as fq4/cpu/block.h has it
//   FQ4_GPTQ_MAX_WEIGHT          weights beyond it are refused
//   fq4_gptq_pack_scale(d)       what stands in the block for the scale d
//
// and after, fq4_gptq_search and with fq4_gptq_rows the function of the interface.

#include "fq4/fq4.h"
#include "ggml-ext.h"
#include "ggml-impl.h"
#include "rounding/rounding.h"

#include <stdbool.h>
#include <string.h>

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
    float   d;  // a scale that a block can hold; 0: nothing chosen
    float   cost;
    float   err[FQ4_QK];
    float   value[FQ4_QK];  // of the table, so that the weight is d * value
    uint8_t row[FQ4_QK / 16];
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
// on, rows of FQ4_QK. Leaves the best row's errors and values.
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
        e[j] = (t[j] - d * v[j]) * (1.0f / u[j * FQ4_QK + j]);
        cost += e[j] * e[j];
        for (int k = j + 1; k < 16; k++) {
            t[k] -= e[j] * u[j * FQ4_QK + k];
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
    float x[FQ4_QK];
    memcpy(x, w, sizeof(x));
    next->d    = d;
    next->cost = 0.0f;
    for (int b = 0; b < FQ4_QK / 16; b++) {
        const int first = 16 * b;
        next->cost += fq4_gptq_round_sub_block(tables, x + first, u + first * FQ4_QK + first, d, next->err + first,
                                               next->value + first, next->row + b);
        if (!(next->cost < limit)) {
            return;
        }
        for (int j = first; j < first + 16; j++) {
            const float   e  = next->err[j];
            const float * uj = u + j * FQ4_QK;
            for (int k = first + 16; k < FQ4_QK; k++) {
                x[k] -= e * uj[k];
            }
        }
    }
}

// d: a scale that a block can hold; 0 is no candidate.
static void fq4_gptq_keep_better(const struct fq4_gptq_row_tables * tables, const float * w, const float * u, float d,
                                 struct fq4_gptq_choice * best) {
    struct fq4_gptq_choice next;
    if (d > 0.0f) {
        fq4_gptq_try_scale(tables, w, u, d, &next, best->cost);
        if (next.cost < best->cost) {
            *best = next;
        }
    }
}

// Tries scales for the block w, whose largest magnitude is amax. False if that is too small for any.
static bool fq4_gptq_search(const struct fq4_gptq_row_tables * tables, const float * w, const float * u,
                            const float * u_inv, float amax, struct fq4_gptq_choice * best);

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

static void fq4_gptq_pack(const struct fq4_gptq_choice * choice, fq4_block * block) {
    block->d = fq4_gptq_pack_scale(choice->d);
    for (int i = 0; i < FQ4_QK / 32; i++) {
        block->s[i] = (uint8_t) (choice->row[2 * i] | choice->row[2 * i + 1] << 4);
    }
    for (int first = 0; first < FQ4_QK; first += 2 * FQ4_RUN) {
        for (int j = first; j < first + FQ4_RUN; j++) {
            block->q[first / 2 + j - first] =
                (uint8_t) (fq4_gptq_code_of(choice, j) | fq4_gptq_code_of(choice, j + FQ4_RUN) << 4);
        }
    }
}

static int32_t fq4_gptq_rows(int64_t nrows, const float * w, const float * u, const float * u_inv, void * dst,
                             int64_t stride, float * err, float * cost) {
    struct fq4_gptq_row_tables tables;
    fq4_gptq_fill_tables(&tables);
    for (int64_t row = 0; row < nrows; row++) {
        const float * x    = w + row * FQ4_QK;
        float         amax = 0.0f;
        for (int j = 0; j < FQ4_QK; j++) {
            const float a = fabsf(x[j]);
            if (!(a <= FQ4_GPTQ_MAX_WEIGHT)) {
                return GGML_EXT_E_FINITE;
            }
            amax = a > amax ? a : amax;
        }
        // A block of zeros, or of weights too small for any d, keeps d = 0 and passes no error on.
        struct fq4_gptq_choice best  = { .cost = INFINITY };
        const bool             tried = fq4_gptq_search(&tables, x, u, u_inv, amax, &best);
        if (!(best.d > 0.0f)) {
            // A candidate that lost to nothing had a cost beyond a float, or NaN: zeros would be wrong.
            if (tried) {
                return GGML_EXT_E_FINITE;
            }
            best.cost = 0.0f;
        }
        fq4_gptq_pack(&best, (fq4_block *) ((char *) dst + row * stride));
        memcpy(err + row * FQ4_QK, best.err, sizeof(best.err));
        cost[row] = best.cost;
    }
    return 0;
}
