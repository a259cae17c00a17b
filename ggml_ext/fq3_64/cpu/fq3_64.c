// FQ3_64's paths, and the dot product that upstream's own code may ask for.

#include "fq3_64.h"

#include "block.h"
#include "fq4/cpu/paths.h"
#include "fq4_64/cpu/dot_q8_0.h"

static const struct ggml_ext_fq4_path * const paths[] = { GGML_EXT_FQ4_PATHS(GGML_EXT_FQ4_ENTRY, fq3_64) };

const struct ggml_ext_fq4_kind ggml_ext_fq3_64_kernels = {
    GGML_TYPE_FQ3_64, QK_FQ3_64, sizeof(ggml_ext_block_fq3_64),
    sizeof(fq4_act),  paths,     (int) (sizeof(paths) / sizeof(paths[0])),
};

void ggml_ext_fq3_64_dot(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc) {
    GGML_UNUSED(bs);
    GGML_UNUSED(bx);
    GGML_UNUSED(by);
    GGML_UNUSED(nrc);
    *s = fq4_dot_q8_0(n, vx, vy);
}
