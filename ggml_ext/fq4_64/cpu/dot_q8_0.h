// The dot product that upstream's own code may ask for, in plain C: for the types with blocks of 64, after block.h.

#include "fq4/fq4.h"

#define GGML_COMMON_DECL_C
#include "ggml-common.h"
#include "ggml-impl.h"

#include <assert.h>

static float fq4_dot_q8_0(int n, const fq4_block * x, const block_q8_0 * y) {
    assert(n % FQ4_QK == 0);
    float sum = 0.0f;
    for (int ib = 0; ib < n / FQ4_QK; ib++, x++, y += 2) {  // two of y for each block of weights
        const float d = FQ4_SCALE(x, GGML_FP16_TO_FP32);
        for (int h = 0; h < 2; h++) {
            const int8_t * even = FQ4_TABLE[x->s[h] & 15];
            const int8_t * odd  = FQ4_TABLE[x->s[h] >> 4];
            int32_t        dot  = 0;
            for (int i = 0; i < 16; i++) {
                dot += even[FQ4_CODE(x, 32 * h + i)] * y[h].qs[i];
                dot += odd[FQ4_CODE(x, 32 * h + 16 + i)] * y[h].qs[16 + i];
            }
            sum += d * GGML_FP16_TO_FP32(y[h].d) * (float) dot;
        }
    }
    return sum;
}
