// GPTQ onto FQ4, see gptq_body.h.

#include "fq4.h"
#include "ggml-ext.h"
#include "ggml-impl.h"
#include "scale.h"

#define FQ4_QK  QK_FQ4
#define FQ4_RUN 64
typedef ggml_ext_block_fq4 fq4_block;

#define FQ4_GPTQ_MAX_WEIGHT GGML_EXT_FQ4_MAX_WEIGHT

static inline ggml_fp16_t fq4_gptq_pack_scale(float d) {
    return GGML_FP32_TO_FP16(d);
}

#include "gptq_body.h"

// First guesses of d, as d = factor * absmax / 127, then refits. docs/rounding.md, "candidates".
static const float factors[] = { 0.80f, 0.90f, 0.95f, 1.00f, 1.05f, 1.10f, 1.15f, 1.20f, 1.30f, 1.40f };
#define N_FACTORS ((int) (sizeof(factors) / sizeof(factors[0])))
#define N_REFITS  2

// e = (w - d v) U^-1 for the chosen values v: the d that minimises |e|^2 is <w U^-1, v U^-1> / |v U^-1|^2.
GGML_EXT_CLONES static float fq4_gptq_refit_scale(const float * w, const float * u_inv,
                                                  const struct fq4_gptq_choice * choice) {
    float a[FQ4_QK] = { 0.0f };
    float b[FQ4_QK] = { 0.0f };
    for (int j = 0; j < FQ4_QK; j++) {
        const float * row = u_inv + j * FQ4_QK;
        for (int k = j; k < FQ4_QK; k++) {
            a[k] += w[j] * row[k];
            b[k] += choice->value[j] * row[k];
        }
    }
    float num = 0.0f;
    float den = 0.0f;
    for (int k = 0; k < FQ4_QK; k++) {
        num += a[k] * b[k];
        den += b[k] * b[k];
    }
    return den > 0.0f ? num / den : 0.0f;
}

static bool fq4_gptq_search(const struct fq4_gptq_row_tables * tables, const float * w, const float * u,
                            const float * u_inv, float amax, struct fq4_gptq_choice * best) {
    float d = 0.0f;
    for (int k = 0; k < N_FACTORS; k++) {
        d = ggml_ext_fq4_round_d(amax * (factors[k] / 127.0f));
        fq4_gptq_keep_better(tables, w, u, d, best);
    }
    for (int k = 0; k < N_REFITS && best->d > 0.0f; k++) {
        fq4_gptq_keep_better(tables, w, u, ggml_ext_fq4_round_d(fq4_gptq_refit_scale(w, u_inv, best)), best);
    }
    return d > 0.0f;
}

int32_t ggml_ext_gptq_fq4(int64_t nrows, const float * w, const float * u, const float * u_inv, void * dst,
                          int64_t stride, float * err, float * cost) {
    if (nrows < 0 || stride < (int64_t) sizeof(fq4_block) || stride % 2 != 0) {
        return GGML_EXT_E_SHAPE;
    }
    return fq4_gptq_rows(nrows, w, u, u_inv, dst, stride, err, cost);
}
