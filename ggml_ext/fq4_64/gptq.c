// GPTQ onto FQ4_64, see fq4/gptq_body.h.

#include "fq4_64.h"
#include "ggml-ext.h"
#include "scale.h"

#define FQ4_QK  QK_FQ4_64
#define FQ4_RUN 32
typedef ggml_ext_block_fq4_64 fq4_block;

#define FQ4_GPTQ_MAX_WEIGHT GGML_EXT_FQ4_64_MAX_WEIGHT

static inline uint8_t fq4_gptq_pack_scale(float d) {
    return ggml_ext_fq4_64_round_d(d);
}

#include "fq4/gptq_body.h"

// The search begins at factor * absmax / 127 and ends when so many scales on either side of the best have been tried.
// docs/rounding.md, "FQ4_64".
#define FIRST_FACTOR 1.15f
#define REACH        5

static bool fq4_gptq_search(const struct fq4_gptq_row_tables * tables, const float * w, const float * u,
                            const float * u_inv, float amax, struct fq4_gptq_choice * best) {
    (void) u_inv;  // for refits, which gain nothing here
    const int first = ggml_ext_fq4_64_round_d(amax * (FIRST_FACTOR / 127.0f));
    int       low   = first;
    int       high  = first;
    int       at    = first;  // the best
    int       next  = first;
    while (next > 0) {
        fq4_gptq_keep_better(tables, w, u, ggml_ext_fq4_64_scales[next], best);
        at   = best->d == ggml_ext_fq4_64_scales[next] ? next : at;
        next = 0;
        if (low > MAX(at - REACH, 1)) {
            next = --low;
        } else if (high < MIN(at + REACH, GGML_EXT_FQ4_64_LARGEST)) {
            next = ++high;
        }
    }
    return first > 0;
}

int32_t ggml_ext_gptq_fq4_64(int64_t nrows, const float * w, const float * u, void * dst, int64_t stride, float * err,
                             float * cost) {
    if (nrows < 0 || stride < (int64_t) sizeof(fq4_block)) {
        return GGML_EXT_E_SHAPE;
    }
    return fq4_gptq_rows(nrows, w, u, NULL, dst, stride, err, cost);
}
