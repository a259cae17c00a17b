#include "kv_store.h"

#include "block.h"
#include "core/ext_op_new.h"
#include "ggml-impl.h"

#include <string.h>

struct ggml_ext_kv_store_params ggml_ext_kv_store_params_of(const struct ggml_tensor * dst) {
    struct ggml_ext_kv_store_params params;
    memcpy(&params, dst->op_params + 1, sizeof(params));
    return params;
}

static bool kv_store_is_heads(const struct ggml_tensor * t) {
    return t != NULL && t->type == GGML_TYPE_F32 && t->nb[0] == sizeof(float) && t->ne[3] == 1;
}

const char * ggml_ext_kv_store_fault(const struct ggml_tensor * dst) {
    const struct ggml_ext_kv_store_params params = ggml_ext_kv_store_params_of(dst);

    const struct ggml_tensor * pool  = dst->src[0];
    const struct ggml_tensor * x     = dst->src[1];
    const struct ggml_tensor * slots = dst->src[2];
    const struct ggml_tensor * keys  = dst->src[4];
    if (!kv_store_is_heads(x)) {
        return "kv_store: x is F32 [d, n_head_kv, n_tokens] with adjacent values";
    }
    if (params.type < 0 || params.type >= GGML_TYPE_COUNT || ggml_blck_size((enum ggml_type) params.type) <= 0 ||
        x->ne[0] % ggml_blck_size((enum ggml_type) params.type) != 0) {
        return "kv_store: the type's blocks divide a head of x";
    }
    if (params.offset < 0 ||
        !ggml_ext_kv_is_pool(
            pool, params.offset + GGML_EXT_KV_SLOTS * ggml_row_size((enum ggml_type) params.type, x->ne[0]))) {
        return "kv_store: the pool is I8 [block, n_blocks], contiguous, blocks of a multiple of 64 bytes that the rows "
               "fit in";
    }
    if (slots == NULL || slots->type != GGML_TYPE_I32 || slots->nb[0] != sizeof(int32_t) || slots->ne[0] != x->ne[1] ||
        slots->ne[1] != x->ne[2] || slots->ne[2] != 1 || slots->ne[3] != 1) {
        return "kv_store: slots is I32 [n_head_kv, n_tokens] with adjacent values";
    }
    const bool fits = params.score % sizeof(float) == 0 && params.score > 0 &&
                      ggml_ext_kv_is_pool(pool, params.score + GGML_EXT_KV_SLOTS * sizeof(float));
    if (keys == NULL ? params.score != 0 && !fits :
                       !fits || !kv_store_is_heads(keys) || (keys->ne[0] != 1 && keys->ne[0] != x->ne[0]) ||
                           keys->ne[1] != x->ne[1] || keys->ne[2] != x->ne[2]) {
        return "kv_store: keys is as x, or one score per head, and the scores fit in a block, at a multiple of 4 bytes";
    }
    return ggml_ext_kv_is_view(dst, pool) ? NULL : "kv_store: the result is a view of the pool";
}

struct ggml_tensor * ggml_ext_kv_store(struct ggml_context * ctx, struct ggml_tensor * pool, struct ggml_tensor * x,
                                       struct ggml_tensor * slots, struct ggml_tensor * cells,
                                       struct ggml_tensor * keys, enum ggml_type type, int offset, int score) {
    struct ggml_tensor *                  result = ggml_view_tensor(ctx, pool);
    const struct ggml_ext_kv_store_params params = { type, offset, score };
    ggml_ext_op_init(result, GGML_EXT_OP_KV_STORE, &params, sizeof(params));
    result->src[0] = pool;
    result->src[1] = x;
    result->src[2] = slots;
    result->src[3] = cells;
    result->src[4] = keys;
    ggml_ext_op_check(result);
    return result;
}
