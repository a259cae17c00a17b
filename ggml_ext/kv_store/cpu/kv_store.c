// GGML_EXT_OP_KV_STORE on the CPU. Threads share the tokens.

#include "kv_store/kv_store.h"

#include "core/cpu/ext_op.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "kv_store/block.h"

#include <math.h>

static const float * kv_store_head(const struct ggml_tensor * t, int64_t head, int64_t token) {
    return (const float *) ((const char *) t->data + head * t->nb[1] + token * t->nb[2]);
}

static float kv_store_score(const float * key, int64_t n) {
    float sum = 0;
    if (n == 1) {
        return key[0];
    }
    for (int64_t i = 0; i < n; i++) {
        sum += key[i] * key[i];
    }
    return -sum;
}

static void kv_store_compute(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct ggml_ext_kv_store_params p     = ggml_ext_kv_store_params_of(dst);
    const struct ggml_tensor *            x     = dst->src[1];
    const struct ggml_tensor *            slots = dst->src[2];
    const struct ggml_tensor *            keys  = dst->src[4];
    const ggml_from_float_t               to    = ggml_get_type_traits_cpu((enum ggml_type) p.type)->from_float;
    const size_t                          row   = ggml_row_size((enum ggml_type) p.type, x->ne[0]);
    GGML_ASSERT(to != NULL);

    for (int64_t token = params->ith; token < x->ne[2]; token += params->nth) {
        for (int64_t head = 0; head < x->ne[1]; head++) {
            const int64_t slot =
                *(const int32_t *) ((const char *) slots->data + head * slots->nb[0] + token * slots->nb[1]);
            GGML_ASSERT(slot >= 0 && slot < dst->ne[1] * GGML_EXT_KV_SLOTS && "ggml-ext: kv_store: a slot of the pool");
            char * block = (char *) dst->data + slot / GGML_EXT_KV_SLOTS * dst->nb[1];
            to(kv_store_head(x, head, token), block + p.offset + slot % GGML_EXT_KV_SLOTS * row, x->ne[0]);
            if (p.score > 0) {
                ((float *) (block + p.score))[slot % GGML_EXT_KV_SLOTS] =
                    keys ? kv_store_score(kv_store_head(keys, head, token), keys->ne[0]) : INFINITY;
            }
        }
    }
}

const struct ggml_ext_cpu_op ggml_ext_cpu_kv_store = { kv_store_compute, NULL, NULL };
