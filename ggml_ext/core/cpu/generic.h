// What the plain C paths of several ops share.

#ifndef GGML_EXT_CPU_GENERIC_H
#define GGML_EXT_CPU_GENERIC_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>

// A path that every processor has.
static inline bool ggml_ext_always(void) {
    return true;
}

// Largest |x|, 0 for n = 0. NaN counts for nothing.
static inline float ggml_ext_abs_max_generic(int64_t n, const float * x) {
    float max = 0.0f;
    for (int64_t i = 0; i < n; i++) {
        const float v = fabsf(x[i]);
        max           = v > max ? v : max;
    }
    return max;
}

#endif  // GGML_EXT_CPU_GENERIC_H
