// FQ4's paths, the types with such kernels, the choice between paths, and the dot product that upstream's own code may ask
// for.

#include "fq4.h"

#include "fq3/cpu/fq3.h"
#include "fq3_64/cpu/fq3_64.h"
#include "fq4_64/cpu/fq4_64.h"
#include "paths.h"

#define GGML_COMMON_DECL_C
#include "ggml-common.h"
#include "ggml-impl.h"

#include <assert.h>
#include <stdatomic.h>
#include <string.h>

static const struct ggml_ext_fq4_path * const paths[] = { GGML_EXT_FQ4_PATHS(GGML_EXT_FQ4_ENTRY, fq4) };

const struct ggml_ext_fq4_kind ggml_ext_fq4_kernels = {
    GGML_TYPE_FQ4,
    QK_FQ4,
    sizeof(ggml_ext_block_fq4),
    sizeof(struct ggml_ext_fq4_act),
    paths,
    (int) (sizeof(paths) / sizeof(paths[0])),
};

const struct ggml_ext_fq4_kind * ggml_ext_fq4_kind_of(enum ggml_type type) {
    switch (type) {
        case GGML_TYPE_FQ4:
            return &ggml_ext_fq4_kernels;
        case GGML_TYPE_FQ4_64:
            return &ggml_ext_fq4_64_kernels;
        case GGML_TYPE_FQ3:
            return &ggml_ext_fq3_kernels;
        case GGML_TYPE_FQ3_64:
            return &ggml_ext_fq3_64_kernels;
        default:
            return NULL;
    }
}

const struct ggml_ext_fq4_path * ggml_ext_fq4_fastest(const struct ggml_ext_fq4_kind * kind) {
    // Threads that race here store the same number: types differ in their kernels alone.
    static atomic_int chosen = -1;
    int               number = chosen;
    if (number < 0) {
        number = 0;
        while (!kind->paths[number]->available()) {
            number++;
        }
        chosen = number;
    }
    return kind->paths[number];
}

float ggml_ext_fq4_dot_q8_k(const struct ggml_ext_fq4_kind * kind, int n, const void * vx, const void * vy) {
    assert(n % QK_FQ4 == 0 && kind->block == QK_FQ4);
    const struct ggml_ext_fq4_path * path = ggml_ext_fq4_fastest(kind);
    const char *                     x    = vx;
    const block_q8_K *               y    = vy;
    float                            sum  = 0.0f;
    for (int ib = 0; ib < n / QK_FQ4; ib++) {
        struct ggml_ext_fq4_act act;
        const void *            acts = &act;
        float                   part;
        float *                 out = &part;
        act.d                       = y[ib].d;
        act.start                   = 0;
        memcpy(act.q, y[ib].qs, sizeof(act.q));
        for (int i = 0; i < QK_FQ4 / 16; i++) {
            act.start -= 128 * y[ib].bsums[i];
        }
        path->dots(1, 1, x + ib * kind->block_size, 0, 1, &acts, &out);
        sum += part;
    }
    return sum;
}

void ggml_ext_fq4_dot(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc) {
    GGML_UNUSED(bs);
    GGML_UNUSED(bx);
    GGML_UNUSED(by);
    GGML_UNUSED(nrc);
    *s = ggml_ext_fq4_dot_q8_k(&ggml_ext_fq4_kernels, n, vx, vy);
}
