// GGML_EXT_OP_ACT_ROUND on the CPU. Threads share a row by columns where rows are few; a thread that
// gets part of a group looks at all of it for the scale, which is cheaper than a barrier.

#include "act_round.h"

#include "act_round/act_round.h"
#include "core/cpu/ext_op.h"
#include "core/cpu/generic.h"
#include "core/x86.h"
#include "ggml-cpu-impl.h"
#include "ggml-impl.h"

#include <math.h>
#include <string.h>

static void act_round_ref(int64_t n, float scale, float q_max, const float * x, float * y) {
    for (int64_t i = 0; i < n; i++) {
        float q = rintf(x[i] / scale);
        q       = q < -q_max ? -q_max : q;
        q       = q > q_max ? q_max : q;
        y[i]    = q * scale;
    }
}

const struct ggml_ext_act_round_path ggml_ext_act_round_generic = {
    "generic",
    ggml_ext_always,
    ggml_ext_abs_max_generic,
    act_round_ref,
};

const struct ggml_ext_act_round_path * const ggml_ext_act_round_paths[] = {
#ifdef GGML_EXT_X86
    &ggml_ext_act_round_avx512,
    &ggml_ext_act_round_avx2,
#endif
    &ggml_ext_act_round_generic,
};
const int ggml_ext_act_round_n_paths = (int) (sizeof(ggml_ext_act_round_paths) / sizeof(ggml_ext_act_round_paths[0]));

static const struct ggml_ext_act_round_path * act_round_path(bool use_ref) {
    const struct ggml_ext_act_round_path * const * path = ggml_ext_act_round_paths;
    while (!use_ref && !(*path)->available()) {
        path++;
    }
    return use_ref ? &ggml_ext_act_round_generic : *path;
}

// Columns [begin, end) of a row of n values.
static void act_round_columns(const struct ggml_ext_act_round_path * path, int64_t n, int64_t group, float q_max,
                              int64_t begin, int64_t end, const float * x, float * y) {
    for (int64_t start = begin - begin % group; start < end; start += group) {
        const float   scale = path->abs_max(MIN(group, n - start), x + start) / q_max;
        const int64_t from  = MAX(begin, start);
        const int64_t to    = MIN(end, start + group);
        if (scale > 0.0f) {
            path->round(to - from, scale, q_max, x + from, y + from);
            continue;
        }
        for (int64_t i = from; i < to; i++) {
            y[i] = 0.0f * x[i];  // zeros, and numbers too small for a scale; NaN stays
        }
    }
}

static void act_round_compute(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct ggml_tensor *       x = dst->src[0];
    struct ggml_ext_act_round_params op;
    memcpy(&op, dst->op_params + 1, sizeof(op));
    const struct ggml_ext_act_round_path * path = act_round_path(params->use_ref);

    const int64_t n       = dst->ne[0];
    const int64_t group   = op.group > 0 ? op.group : n;
    const float   q_max   = (float) ((1 << (op.bits - 1)) - 1);
    const int64_t n_rows  = ggml_nrows(dst);
    const bool    by_rows = n_rows % params->nth == 0 || n_rows >= 8 * (int64_t) params->nth;
    const int64_t begin   = by_rows ? 0 : n * params->ith / params->nth;
    const int64_t end     = by_rows ? n : n * (params->ith + 1) / params->nth;
    for (int64_t row = by_rows ? params->ith : 0; row < n_rows; row += by_rows ? params->nth : 1) {
        const int64_t i1 = row % x->ne[1];
        const int64_t i2 = row / x->ne[1] % x->ne[2];
        const int64_t i3 = row / (x->ne[1] * x->ne[2]);
        const char *  px = (const char *) x->data + i1 * x->nb[1] + i2 * x->nb[2] + i3 * x->nb[3];
        act_round_columns(path, n, group, q_max, begin, end, (const float *) px, (float *) dst->data + row * n);
    }
}

const struct ggml_ext_cpu_op ggml_ext_cpu_act_round = { act_round_compute, NULL, NULL };
