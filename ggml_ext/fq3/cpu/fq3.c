// FQ3's paths, and the dot product that upstream's own code may ask for.

#include "fq3.h"

#include "fq4/cpu/paths.h"
#include "ggml-impl.h"

static const struct ggml_ext_fq4_path * const paths[] = { GGML_EXT_FQ4_PATHS(GGML_EXT_FQ4_ENTRY, fq3) };

const struct ggml_ext_fq4_kind ggml_ext_fq3_kernels = {
    GGML_TYPE_FQ3,
    QK_FQ3,
    sizeof(ggml_ext_block_fq3),
    sizeof(struct ggml_ext_fq4_act),
    paths,
    (int) (sizeof(paths) / sizeof(paths[0])),
};

void ggml_ext_fq3_dot(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc) {
    GGML_UNUSED(bs);
    GGML_UNUSED(bx);
    GGML_UNUSED(by);
    GGML_UNUSED(nrc);
    *s = ggml_ext_fq4_dot_q8_k(&ggml_ext_fq3_kernels, n, vx, vy);
}
