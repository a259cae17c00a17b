// GGML_EXT_OP_ACT_ROUND inside ggml-cpu: the inner loops, one set per instruction set.

#ifndef GGML_EXT_ACT_ROUND_CPU_H
#define GGML_EXT_ACT_ROUND_CPU_H

#include "ggml.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_ext_act_round_path {
    const char * name;
    bool (*available)(void);
    float (*abs_max)(int64_t n, const float * x);  // of the values that are not NaN; 0 for none
    // y = scale * clamp(rint(x / scale), -q_max, q_max), scale > 0
    void (*round)(int64_t n, float scale, float q_max, const float * x, float * y);
};

// Plain C, always available: the reference of the others, which give the same bits. The x86 paths are in
// x86.c.
extern const struct ggml_ext_act_round_path ggml_ext_act_round_generic;
extern const struct ggml_ext_act_round_path ggml_ext_act_round_avx512;
extern const struct ggml_ext_act_round_path ggml_ext_act_round_avx2;

// Fastest first; the last entry is the generic path.
GGML_API const struct ggml_ext_act_round_path * const ggml_ext_act_round_paths[];
GGML_API const int                                    ggml_ext_act_round_n_paths;

#ifdef __cplusplus
}
#endif

#endif  // GGML_EXT_ACT_ROUND_CPU_H
