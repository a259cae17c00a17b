// FQ4's paths, the choice between paths, and the dot product that upstream's own code may ask for.

#include "fq4.h"

#include "fq4_64/cpu/fq4_64.h"
#include "paths.h"

#define GGML_COMMON_DECL_C
#include "ggml-common.h"
#include "ggml-impl.h"

#include <assert.h>
#include <stdatomic.h>
#include <string.h>

static const struct ggml_ext_fq4_path * const paths[] = {
#ifdef GGML_EXT_X86
    &ggml_ext_fq4_avx512_vnni,
#    ifdef GGML_EXT_AVX_VNNI
    &ggml_ext_fq4_avxvnni,
#    endif
    &ggml_ext_fq4_avx2,
#endif
#ifdef GGML_EXT_FQ4_HAS_NEON
    &ggml_ext_fq4_neon,
#endif
    &ggml_ext_fq4_generic,
};

const struct ggml_ext_fq4_kind ggml_ext_fq4_kernels = {
    GGML_TYPE_FQ4,
    QK_FQ4,
    sizeof(ggml_ext_block_fq4),
    sizeof(struct ggml_ext_fq4_act),
    paths,
    (int) (sizeof(paths) / sizeof(paths[0])),
};

const struct ggml_ext_fq4_kind * ggml_ext_fq4_kind_of(enum ggml_type type) {
    return type == GGML_TYPE_FQ4 ? &ggml_ext_fq4_kernels : type == GGML_TYPE_FQ4_64 ? &ggml_ext_fq4_64_kernels : NULL;
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

void ggml_ext_fq4_dot(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc) {
    assert(n % QK_FQ4 == 0 && nrc == 1);
    GGML_UNUSED(bs);
    GGML_UNUSED(bx);
    GGML_UNUSED(by);
    GGML_UNUSED(nrc);
    const struct ggml_ext_fq4_path * path = ggml_ext_fq4_fastest(&ggml_ext_fq4_kernels);
    const ggml_ext_block_fq4 *       x    = vx;
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
        path->dots(1, 1, x + ib, 0, 1, &acts, &out);
        sum += part;
    }
    *s = sum;
}
