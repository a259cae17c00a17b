// FQ4_64's paths, and the dot product that upstream's own code may ask for, in plain C.

#include "fq4_64.h"

#include "fq4/cpu/paths.h"

#define GGML_COMMON_DECL_C
#include "ggml-common.h"
#include "ggml-impl.h"

#include <assert.h>

static const struct ggml_ext_fq4_path * const paths[] = {
#ifdef GGML_EXT_X86
    &ggml_ext_fq4_64_avx512_vnni,
#    ifdef GGML_EXT_AVX_VNNI
    &ggml_ext_fq4_64_avxvnni,
#    endif
    &ggml_ext_fq4_64_avx2,
#endif
#ifdef GGML_EXT_FQ4_HAS_NEON
    &ggml_ext_fq4_64_neon,
#endif
    &ggml_ext_fq4_64_generic,
};

const struct ggml_ext_fq4_kind ggml_ext_fq4_64_kernels = {
    GGML_TYPE_FQ4_64,
    QK_FQ4_64,
    sizeof(ggml_ext_block_fq4_64),
    sizeof(struct ggml_ext_fq4_64_act),
    paths,
    (int) (sizeof(paths) / sizeof(paths[0])),
};

void ggml_ext_fq4_64_dot(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc) {
    assert(n % QK_FQ4_64 == 0 && nrc == 1);
    GGML_UNUSED(bs);
    GGML_UNUSED(bx);
    GGML_UNUSED(by);
    GGML_UNUSED(nrc);
    const ggml_ext_block_fq4_64 * x   = vx;
    const block_q8_0 *            y   = vy;  // two for each block of weights
    float                         sum = 0.0f;
    for (int ib = 0; ib < n / QK_FQ4_64; ib++, x++, y += 2) {
        const float d = ggml_ext_fq4_64_scales[x->d];
        for (int h = 0; h < 2; h++) {
            const int8_t * even = ggml_ext_fq4_table[x->s[h] & 15];
            const int8_t * odd  = ggml_ext_fq4_table[x->s[h] >> 4];
            int32_t        dot  = 0;
            for (int i = 0; i < 16; i++) {
                dot += even[x->q[i] >> 4 * h & 15] * y[h].qs[i];
                dot += odd[x->q[16 + i] >> 4 * h & 15] * y[h].qs[16 + i];
            }
            sum += d * GGML_FP16_TO_FP32(y[h].d) * (float) dot;
        }
    }
    *s = sum;
}
