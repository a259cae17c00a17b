#include "kv_score.h"

#include "core/ext_op_new.h"
#include "ggml-impl.h"
#include "kv_attend/kv_attend.h"
#include "kv_store/block.h"

#include <string.h>

#define MAX_WINDOW 1024

struct ggml_ext_kv_score_params ggml_ext_kv_score_params_of(const struct ggml_tensor * dst) {
    struct ggml_ext_kv_score_params params;
    memcpy(&params, dst->op_params + 1, sizeof(params));
    return params;
}

const char * ggml_ext_kv_score_fault(const struct ggml_tensor * dst) {
    const struct ggml_ext_kv_score_params p     = ggml_ext_kv_score_params_of(dst);
    const struct ggml_tensor *            pool  = dst->src[1];
    const char *                          fault = ggml_ext_kv_attend_sources_fault(dst);
    if (fault != NULL) {
        return fault;
    }
    if (dst->src[7] != NULL) {
        return "kv_score: codes are not scored";
    }
    if (p.window < 1 || p.window > MAX_WINDOW || p.recent < 1 || !(p.decay >= 0 && p.decay <= 1)) {
        return "kv_score: a window of 1 to 1024 queries, at least one recent position, a decay of 0 to 1";
    }
    const struct ggml_ext_kv_block block = ggml_ext_kv_block_of((enum ggml_type) p.attend.type_k, p.attend.dk,
                                                                (enum ggml_type) p.attend.type_v, p.attend.dv, false);
    if (p.score % sizeof(float) != 0 || p.score < 0 || (size_t) p.score < block.size ||
        !ggml_ext_kv_is_pool(pool, p.score + GGML_EXT_KV_SLOTS * sizeof(float))) {
        return "kv_score: the scores fit in a block behind its rows, at a multiple of 4 bytes";
    }
    return ggml_ext_kv_is_view(dst, pool) ? NULL : "kv_score: the result is a view of the pool";
}

struct ggml_tensor * ggml_ext_kv_score(struct ggml_context * ctx, struct ggml_tensor * q, struct ggml_tensor * pool,
                                       struct ggml_tensor * table, struct ggml_tensor * cells,
                                       struct ggml_tensor * order, struct ggml_tensor * mask,
                                       struct ggml_tensor * sinks, const struct ggml_ext_kv_score_params * params) {
    struct ggml_tensor * result = ggml_view_tensor(ctx, pool);
    ggml_ext_op_init(result, GGML_EXT_OP_KV_SCORE, params, sizeof(*params));
    struct ggml_tensor * const sources[] = { q, pool, table, cells, order, mask, sinks };
    memcpy(result->src, sources, sizeof(sources));
    ggml_ext_op_check(result);
    return result;
}
