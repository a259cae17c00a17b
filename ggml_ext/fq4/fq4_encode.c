// The search for scales, table rows and codes, see encode.h. Compiled without contraction, so that all machines, and the numpy
// version in python/ggml_ext/gguf/fq4_search.py, find the same.

#include "encode.h"
#include "ggml-impl.h"
#include "ggml-threading.h"
#include "scale.h"

#include <assert.h>
#include <math.h>
#include <string.h>

// The encoder's inner loop runs over the 16 rows: the compiler makes it one vector operation where
// it may use one. The variants differ in speed only.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#    define FQ4_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#    define FQ4_CLONES
#endif

// An importance counts as at least this part of its block's mean, so that a sub-block whose columns were
// never active still gets a row that fits it.
#define IMPORTANCE_FLOOR 1e-4f

// First guesses of d, as d = factor * absmax / 127, then refits. docs/fq4.md and docs/fq3.md, "candidates".
static const float fq4_factors[] = { 0.90f, 0.95f, 1.00f, 1.05f, 1.10f, 1.15f, 1.20f, 1.25f, 1.30f };

#define FQ4_N_FACTORS ((int) (sizeof(fq4_factors) / sizeof(fq4_factors[0])))
#define FQ4_N_REFITS  2

struct ggml_ext_fq4_nearest ggml_ext_fq4_nearest = { .table = &ggml_ext_fq4_table[0][0], .n_codes = 16 };

static void fq4_fill(struct ggml_ext_fq4_nearest * nearest) {
    for (int cell = 0; cell < GGML_EXT_FQ4_N_CELLS; cell++) {
        const int t4 = 2 * cell - 511;  // four times the middle of the cell
        for (int row = 0; row < 16; row++) {
            const int8_t * values = nearest->table + row * nearest->n_codes;
            int            code   = 0;
            while (code < nearest->n_codes - 1 && t4 > 2 * (values[code] + values[code + 1])) {
                code++;
            }
            nearest->code[cell][row]  = (uint8_t) code;
            nearest->value[cell][row] = (float) values[code];
        }
    }
}

void ggml_ext_fq4_nearest_fill(struct ggml_ext_fq4_nearest * nearest) {
    if (atomic_load_explicit(&nearest->filled, memory_order_acquire)) {
        return;
    }
    ggml_critical_section_start();
    if (!atomic_load_explicit(&nearest->filled, memory_order_relaxed)) {
        fq4_fill(nearest);
        atomic_store_explicit(&nearest->filled, true, memory_order_release);
    }
    ggml_critical_section_end();
}

bool ggml_ext_fq4_largest(int n, const float * x, float limit, float * largest) {
    float amax  = 0.0f;
    bool  valid = true;
    for (int i = 0; i < n; i++) {
        const float a = fabsf(x[i]);
        valid         = valid && a <= limit;
        amax          = a > amax ? a : amax;
    }
    *largest = amax;
    return valid;
}

// The weights of the squared errors in a block of n weights: the importances with a floor; ones where there are none
// (NULL), or only zeros.
static void fq4_error_weights(int n, const float * importance, float * weight) {
    float sum = 0.0f;
    for (int i = 0; importance && i < n; i++) {
        sum += importance[i];
    }
    const float floor = sum * (IMPORTANCE_FLOOR / (float) n);
    for (int i = 0; i < n; i++) {
        weight[i] = !(sum > 0.0f) ? 1.0f : importance[i] > floor ? importance[i] : floor;
    }
}

// One lane per row of the table (GCC and Clang vector extensions; without the hardware, plain code).
typedef float fq4_f32x16 __attribute__((vector_size(64), aligned(4), may_alias));

FQ4_CLONES static void fq4_choose(const struct ggml_ext_fq4_nearest * nearest, int n_subs, const float * x,
                                  const float * weight, float d, struct ggml_ext_fq4_choice * out) {
    const float inv = 1.0f / d;
    float       t[QK_FQ4];
    for (int i = 0; i < 16 * n_subs; i++) {
        t[i]         = x[i] * inv;
        float where  = t[i] * 2.0f + 256.0f;
        where        = where > 0.0f ? where : 0.0f;
        where        = where < 511.0f ? where : 511.0f;
        out->cell[i] = (int16_t) (int32_t) where;
    }
    float sum = 0.0f;
    for (int b = 0; b < n_subs; b++) {
        fq4_f32x16 cost = { 0.0f };
        for (int i = 16 * b; i < 16 * b + 16; i++) {
            const fq4_f32x16 e = t[i] - *(const fq4_f32x16 *) nearest->value[out->cell[i]];
            cost += weight[i] * e * e;
        }
        int best = 0;
        for (int row = 1; row < 16; row++) {
            best = cost[row] < cost[best] ? row : best;
        }
        out->row[b] = (uint8_t) best;
        sum += cost[best];
    }
    out->nearest = nearest;
    out->d       = d;
    out->cost    = sum * (d * d);
}

void ggml_ext_fq4_try(int n_subs, const float * x, const float * weight, float d, struct ggml_ext_fq4_choice * best) {
    struct ggml_ext_fq4_choice next;
    if (d > 0.0f) {
        fq4_choose(best->nearest, n_subs, x, weight, d, &next);
        if (next.cost < best->cost) {
            *best = next;
        }
    }
}

float ggml_ext_fq4_refit(int n_subs, const float * x, const float * weight, const struct ggml_ext_fq4_choice * choice) {
    float num[16] = { 0.0f };
    float den[16] = { 0.0f };
    for (int b = 0; b < n_subs; b++) {
        for (int i = 0; i < 16; i++) {
            const float v  = choice->nearest->value[choice->cell[16 * b + i]][choice->row[b]];
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

uint8_t ggml_ext_fq4_code(const struct ggml_ext_fq4_choice * choice, int i) {
    return choice->nearest->code[choice->cell[i]][choice->row[i / 16]];
}

void ggml_ext_fq4_pack_rows(const struct ggml_ext_fq4_choice * choice, int n_subs, uint8_t * s) {
    for (int i = 0; i < n_subs / 2; i++) {
        s[i] = (uint8_t) (choice->row[2 * i] | choice->row[2 * i + 1] << 4);
    }
}

float ggml_ext_fq4_round_d(float d) {
    const float fp16_max = 65504.0f;
    return GGML_FP16_TO_FP32(GGML_FP32_TO_FP16(d < fp16_max ? d : fp16_max));
}

bool ggml_ext_fq4_search(const float * x, const float * weight, struct ggml_ext_fq4_choice * best) {
    const int n_subs = QK_FQ4 / QK_FQ4_SUB;
    float     amax;
    if (!ggml_ext_fq4_largest(QK_FQ4, x, GGML_EXT_FQ4_MAX_WEIGHT, &amax)) {
        return false;
    }
    for (int k = 0; k < FQ4_N_FACTORS; k++) {
        ggml_ext_fq4_try(n_subs, x, weight, ggml_ext_fq4_round_d(amax * (fq4_factors[k] / 127.0f)), best);
    }
    for (int k = 0; k < FQ4_N_REFITS; k++) {
        ggml_ext_fq4_try(n_subs, x, weight, ggml_ext_fq4_round_d(ggml_ext_fq4_refit(n_subs, x, weight, best)), best);
    }
    // Weights too small for fp16 are zeros. Where there was a candidate, its cost overflowed: zeros would be wrong.
    return best->d > 0.0f || !(ggml_ext_fq4_round_d(amax * (fq4_factors[FQ4_N_FACTORS - 1] / 127.0f)) > 0.0f);
}

size_t ggml_ext_fq4_encode_rows(const struct ggml_ext_fq4_encoder * encoder, const float * src, void * dst,
                                int64_t nrows, int64_t n_per_row, const float * imatrix) {
    assert(n_per_row % encoder->block == 0);
    ggml_ext_fq4_nearest_fill(encoder->nearest);
    char * out = dst;
    for (int64_t row = 0; row < nrows; row++) {
        for (int64_t i = 0; i < n_per_row; i += encoder->block) {
            struct ggml_ext_fq4_choice best = { .nearest = encoder->nearest, .cost = INFINITY };
            float                      weight[QK_FQ4];
            fq4_error_weights(encoder->block, imatrix ? imatrix + i : NULL, weight);
            if (encoder->search(src + row * n_per_row + i, weight, &best)) {
                encoder->pack(&best, out);
            } else {
                memset(out, 0, encoder->block_size);
                encoder->refuse(out);
            }
            out += encoder->block_size;
        }
    }
    return (size_t) (out - (char *) dst);
}
