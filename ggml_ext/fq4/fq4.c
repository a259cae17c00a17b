// FQ4 reference: encoder, decoder. Every float operation is a single-precision one in
// the order written (the file is compiled without contraction), so that all machines, and the numpy
// version in python/ggml_ext/gguf/fq4.py, give the same bytes.

#include "fq4.h"

#include "ggml-impl.h"
#include "ggml-threading.h"
#include "nearest.h"
#include "table.h"

#include <assert.h>
#include <math.h>
#include <stdatomic.h>
#include <string.h>

static_assert(sizeof(ggml_ext_block_fq4) == 138, "FQ4 blocks are packed");

// The encoder's inner loop runs over the 16 rows: the compiler makes it one vector operation where
// it may use one. The variants differ in speed only.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#    define FQ4_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#    define FQ4_CLONES
#endif

#define FQ4_SAME(t) t
#define FQ4_ROW(s)  { GGML_EXT_FQ4_ROW_##s(FQ4_SAME) }
const int8_t ggml_ext_fq4_table[16][16] = {
    FQ4_ROW(0), FQ4_ROW(1), FQ4_ROW(2),  FQ4_ROW(3),  FQ4_ROW(4),  FQ4_ROW(5),  FQ4_ROW(6),  FQ4_ROW(7),
    FQ4_ROW(8), FQ4_ROW(9), FQ4_ROW(10), FQ4_ROW(11), FQ4_ROW(12), FQ4_ROW(13), FQ4_ROW(14), FQ4_ROW(15),
};

// First guesses of d, as d = factor * absmax / 127. docs/fq4.md, "candidates".
static const float fq4_factors[] = { 0.90f, 0.95f, 1.00f, 1.05f, 1.10f, 1.15f, 1.20f, 1.25f, 1.30f };

#define FQ4_N_FACTORS ((int) (sizeof(fq4_factors) / sizeof(fq4_factors[0])))
#define FQ4_N_REFITS  2

// An importance counts as at least this part of its block's mean, so that a sub-block whose columns were
// never active still gets a row that fits it.
#define FQ4_IMPORTANCE_FLOOR 1e-4f

static struct ggml_ext_fq4_nearest fq4_nearest;

static void fq4_init_nearest(void) {
    for (int cell = 0; cell < FQ4_N_CELLS; cell++) {
        const int t4 = 2 * cell - 511;  // four times the middle of the cell
        for (int row = 0; row < 16; row++) {
            const int8_t * values = ggml_ext_fq4_table[row];
            int            code   = 0;
            while (code < 15 && t4 > 2 * (values[code] + values[code + 1])) {
                code++;
            }
            fq4_nearest.code[cell][row]  = (uint8_t) code;
            fq4_nearest.value[cell][row] = (float) values[code];
        }
    }
}

static void fq4_init(void) {
    static atomic_bool ready = false;
    if (atomic_load_explicit(&ready, memory_order_acquire)) {
        return;
    }
    ggml_critical_section_start();
    if (!atomic_load_explicit(&ready, memory_order_relaxed)) {
        fq4_init_nearest();
        atomic_store_explicit(&ready, true, memory_order_release);
    }
    ggml_critical_section_end();
}

const struct ggml_ext_fq4_nearest * ggml_ext_fq4_get_nearest(void) {
    fq4_init();
    return &fq4_nearest;
}

// The best row of each sub-block for a given d, and the codes.
struct fq4_choice {
    float   d;     // as the block will hold it: a value that fp16 represents
    float   cost;  // sum of weight * error^2
    uint8_t row[16];
    int16_t cell[QK_FQ4];
};

float ggml_ext_fq4_round_d(float d) {
    const float fp16_max = 65504.0f;
    return GGML_FP16_TO_FP32(GGML_FP32_TO_FP16(d < fp16_max ? d : fp16_max));
}

// One lane per row of the table (GCC and Clang vector extensions; without the hardware, plain code).
typedef float fq4_f32x16 __attribute__((vector_size(64), aligned(4), may_alias));

FQ4_CLONES static void fq4_choose(const float * x, const float * weight, float d, struct fq4_choice * out) {
    const float inv = 1.0f / d;
    float       t[QK_FQ4];
    for (int i = 0; i < QK_FQ4; i++) {
        t[i]         = x[i] * inv;
        float where  = t[i] * 2.0f + 256.0f;
        where        = where > 0.0f ? where : 0.0f;
        where        = where < 511.0f ? where : 511.0f;
        out->cell[i] = (int16_t) (int32_t) where;
    }
    float sum = 0.0f;
    for (int b = 0; b < 16; b++) {
        fq4_f32x16 cost = { 0.0f };
        for (int i = 16 * b; i < 16 * b + 16; i++) {
            const fq4_f32x16 e = t[i] - *(const fq4_f32x16 *) fq4_nearest.value[out->cell[i]];
            cost += weight[i] * e * e;
        }
        int best = 0;
        for (int row = 1; row < 16; row++) {
            best = cost[row] < cost[best] ? row : best;
        }
        out->row[b] = (uint8_t) best;
        sum += cost[best];
    }
    out->d    = d;
    out->cost = sum * (d * d);
}

// The d that minimises the weighted squared error for the chosen rows and codes; 0 if none does.
static float fq4_refit_d(const float * x, const float * weight, const struct fq4_choice * choice) {
    float num[16] = { 0.0f };
    float den[16] = { 0.0f };
    for (int b = 0; b < 16; b++) {
        for (int i = 0; i < 16; i++) {
            const float v  = fq4_nearest.value[choice->cell[16 * b + i]][choice->row[b]];
            const float wv = weight[16 * b + i] * v;
            num[i] += wv * x[16 * b + i];
            den[i] += wv * v;
        }
    }
    for (int i = 1; i < 16; i++) {
        num[0] += num[i];
        den[0] += den[i];
    }
    return den[0] > 0.0f ? num[0] / den[0] : 0.0f;
}

static void fq4_pack(const struct fq4_choice * choice, ggml_ext_block_fq4 * block) {
    block->d = GGML_FP32_TO_FP16(choice->d);
    for (int i = 0; i < 8; i++) {
        block->s[i] = (uint8_t) (choice->row[2 * i] | choice->row[2 * i + 1] << 4);
    }
    for (int h = 0; h < 2; h++) {
        for (int j = 0; j < 64; j++) {
            const int lo         = 128 * h + j;
            const int hi         = lo + 64;
            const int code_lo    = fq4_nearest.code[choice->cell[lo]][choice->row[lo / 16]];
            const int code_hi    = fq4_nearest.code[choice->cell[hi]][choice->row[hi / 16]];
            block->q[64 * h + j] = (uint8_t) (code_lo | code_hi << 4);
        }
    }
}

// Tries one d: keeps it if it beats the best so far. fp16 may round d to 0, which is no candidate.
static void fq4_try(const float * x, const float * weight, float d, struct fq4_choice * best) {
    struct fq4_choice next;
    d = ggml_ext_fq4_round_d(d);
    if (d > 0.0f) {
        fq4_choose(x, weight, d, &next);
        if (next.cost < best->cost) {
            *best = next;
        }
    }
}

// What ggml_validate_row_data reports.
static void fq4_refuse_block(ggml_ext_block_fq4 * block) {
    memset(block, 0, sizeof(*block));
    block->d = GGML_FP32_TO_FP16(NAN);
}

static void fq4_encode_block(const float * x, const float * weight, ggml_ext_block_fq4 * block) {
    float amax  = 0.0f;
    bool  valid = true;
    for (int i = 0; i < QK_FQ4; i++) {
        const float a = fabsf(x[i]);
        valid         = valid && a <= GGML_EXT_FQ4_MAX_WEIGHT;
        amax          = a > amax ? a : amax;
    }
    if (!valid) {
        fq4_refuse_block(block);
        return;
    }

    struct fq4_choice best = { 0 };
    best.cost              = INFINITY;
    for (int k = 0; k < FQ4_N_FACTORS; k++) {
        fq4_try(x, weight, amax * (fq4_factors[k] / 127.0f), &best);
    }
    for (int k = 0; k < FQ4_N_REFITS; k++) {
        fq4_try(x, weight, fq4_refit_d(x, weight, &best), &best);
    }
    // Weights too small for fp16 are zeros. Where there was a candidate, its cost overflowed: zeros would be wrong.
    if (best.d == 0.0f && ggml_ext_fq4_round_d(amax * (fq4_factors[FQ4_N_FACTORS - 1] / 127.0f)) > 0.0f) {
        fq4_refuse_block(block);
        return;
    }
    fq4_pack(&best, block);
}

// The weights of the squared errors in one block: the importances with their floor; ones where there are
// none, or only zeros.
static void fq4_block_weights(const float * importance, float * weight) {
    float sum = 0.0f;
    for (int i = 0; importance && i < QK_FQ4; i++) {
        sum += importance[i];
    }
    const float floor = sum * (FQ4_IMPORTANCE_FLOOR / QK_FQ4);
    for (int i = 0; i < QK_FQ4; i++) {
        weight[i] = !(sum > 0.0f) ? 1.0f : importance[i] > floor ? importance[i] : floor;
    }
}

void ggml_ext_fq4_quantize_row(const float * x, void * y, int64_t k) {
    ggml_ext_fq4_quantize(x, y, 1, k, NULL);
}

size_t ggml_ext_fq4_quantize(const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix) {
    assert(n_per_row % QK_FQ4 == 0);
    fq4_init();
    char * out = dst;
    for (int64_t row = 0; row < nrows; row++) {
        for (int64_t i = 0; i < n_per_row; i += QK_FQ4) {
            float weight[QK_FQ4];
            fq4_block_weights(imatrix ? imatrix + i : NULL, weight);
            fq4_encode_block(src + row * n_per_row + i, weight, (ggml_ext_block_fq4 *) out);
            out += sizeof(ggml_ext_block_fq4);
        }
    }
    return (size_t) (out - (char *) dst);
}

void ggml_ext_fq4_dequantize_row(const void * x, float * y, int64_t k) {
    assert(k % QK_FQ4 == 0);
    const ggml_ext_block_fq4 * block = x;
    for (int64_t ib = 0; ib < k / QK_FQ4; ib++, block++, y += QK_FQ4) {
        const float d = GGML_FP16_TO_FP32(block->d);
        for (int i = 0; i < QK_FQ4; i++) {
            const int b    = i / 16;
            const int row  = block->s[b / 2] >> (4 * (b % 2)) & 15;
            const int code = block->q[64 * (i / 128) + i % 64] >> (4 * (i / 64 % 2)) & 15;
            y[i]           = d * (float) ggml_ext_fq4_table[row][code];
        }
    }
}
