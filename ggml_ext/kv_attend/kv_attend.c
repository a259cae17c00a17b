#include "kv_attend.h"

#include "attention/setting.h"
#include "core/ext_op_new.h"
#include "ggml-impl.h"
#include "kv_code/kv_code.h"
#include "kv_store/block.h"

#include <string.h>

struct ggml_ext_kv_attend_params ggml_ext_kv_attend_params_of(const struct ggml_tensor * dst) {
    struct ggml_ext_kv_attend_params params;
    memcpy(&params, dst->op_params + 1, sizeof(params));
    return params;
}

struct ggml_ext_kv_cold_params ggml_ext_kv_attend_cold_of(const struct ggml_tensor * dst) {
    struct ggml_ext_kv_cold_params params;
    const size_t                   behind = 1 + sizeof(struct ggml_ext_kv_attend_params) / sizeof(int32_t);
    memcpy(&params, dst->op_params + behind, sizeof(params));
    return params;
}

static bool kv_attend_is_row(const struct ggml_tensor * t, enum ggml_type type) {
    return t != NULL && t->type == type && ggml_is_contiguous(t) && t->ne[2] == 1 && t->ne[3] == 1;
}

static bool kv_attend_is_head(int32_t type, int32_t d) {
    return (type == GGML_TYPE_Q8_0 || type == GGML_TYPE_Q5_0 || type == GGML_TYPE_Q4_0 || type == GGML_TYPE_IQ4_NL ||
            type == GGML_TYPE_F16) &&
           d > 0 && d <= GGML_EXT_ATTENTION_MAX_HEAD && d % ggml_blck_size((enum ggml_type) type) == 0;
}

const char * ggml_ext_kv_attend_sources_fault(const struct ggml_tensor * dst) {
    const struct ggml_ext_kv_attend_params p = ggml_ext_kv_attend_params_of(dst);

    const struct ggml_tensor * q     = dst->src[0];
    const struct ggml_tensor * pool  = dst->src[1];
    const struct ggml_tensor * table = dst->src[2];
    const struct ggml_tensor * cells = dst->src[3];
    const struct ggml_tensor * order = dst->src[4];
    const struct ggml_tensor * mask  = dst->src[5];
    const struct ggml_tensor * sinks = dst->src[6];
    if (!kv_attend_is_head(p.type_k, p.dk) || !kv_attend_is_head(p.type_v, p.dv)) {
        return "kv_attend: K and V are q8_0, q5_0, q4_0, iq4_nl or f16, of at most 1024 channels that their blocks "
               "divide";
    }
    if (p.n_keys < 0) {
        return "kv_attend: the keys of the longest list";
    }
    if (p.n_head_kv < 1 || p.first_list < 0 || p.first_list > p.n_lists - p.n_head_kv) {
        return "kv_attend: a lane's lists hold those of the layer's heads";
    }
    if (q == NULL || q->type != GGML_TYPE_F32 || q->nb[0] != sizeof(float) || q->ne[0] != p.dk ||
        q->ne[2] % p.n_head_kv != 0) {
        return "kv_attend: q is F32 [dk, n_queries, n_head, n_streams] with adjacent values";
    }
    const struct ggml_ext_kv_block block =
        ggml_ext_kv_block_of((enum ggml_type) p.type_k, p.dk, (enum ggml_type) p.type_v, p.dv, false);
    if (!ggml_ext_kv_is_pool(pool, block.size)) {
        return "kv_attend: the pool is I8 [block, n_blocks], contiguous, blocks of a multiple of 64 bytes that the "
               "rows fit in";
    }
    if (!kv_attend_is_row(cells, GGML_TYPE_I32) || cells->ne[0] < 1) {
        return "kv_attend: cells is I32 [n_positions, n_lanes], contiguous";
    }
    if (!kv_attend_is_row(table, GGML_TYPE_I32) || table->ne[1] != 1 || table->ne[0] < cells->ne[1] * p.n_lists + 1) {
        return "kv_attend: table is I32 and holds an offset per list and one more";
    }
    if (!kv_attend_is_row(order, GGML_TYPE_I32) || ggml_nelements(order) != cells->ne[1] + 1 + q->ne[1] * q->ne[3]) {
        return "kv_attend: order is I32 [n_lanes + 1 + n_tokens]";
    }
    if (mask == NULL || mask->type != GGML_TYPE_F16 || mask->nb[0] != sizeof(ggml_fp16_t) || mask->ne[0] < 1 ||
        mask->ne[1] < q->ne[1] || mask->ne[2] < 1 || mask->ne[3] < 1 || q->ne[2] % mask->ne[2] != 0 ||
        q->ne[3] % mask->ne[3] != 0) {
        return "kv_attend: mask is F16 [n_cells, >= n_queries, ...] with adjacent values";
    }
    if (sinks != NULL && (!kv_attend_is_row(sinks, GGML_TYPE_F32) || ggml_nelements(sinks) != q->ne[2])) {
        return "kv_attend: sinks is F32 [n_head]";
    }
    return NULL;
}

static const char * kv_attend_codes_fault(const struct ggml_tensor * dst, const struct ggml_ext_kv_attend_params * p) {
    if (dst->src[7] == NULL) {
        return NULL;
    }
    const struct ggml_ext_kv_cold_params cold = ggml_ext_kv_attend_cold_of(dst);
    if (p->type_k != GGML_TYPE_Q8_0 || p->type_v != GGML_TYPE_Q8_0) {
        return "kv_attend: beside codes K and V are q8_0";
    }
    return ggml_ext_kv_cold_fault(&cold, p->dk, p->dv, p->n_head_kv, dst->src[7], dst->src[8], dst->src[9]);
}

const char * ggml_ext_kv_attend_fault(const struct ggml_tensor * dst) {
    const struct ggml_ext_kv_attend_params p     = ggml_ext_kv_attend_params_of(dst);
    const struct ggml_tensor *             q     = dst->src[0];
    const char *                           fault = ggml_ext_kv_attend_sources_fault(dst);
    if (fault == NULL) {
        fault = kv_attend_codes_fault(dst, &p);
    }
    if (fault != NULL) {
        return fault;
    }
    return dst->type == GGML_TYPE_F32 && ggml_is_contiguous(dst) && dst->ne[0] == p.dv && dst->ne[1] == q->ne[2] &&
                   dst->ne[2] == q->ne[1] && dst->ne[3] == q->ne[3] ?
               NULL :
               "kv_attend: the result is F32 [dv, n_head, n_queries, n_streams], contiguous";
}

struct ggml_tensor * ggml_ext_kv_attend(struct ggml_context * ctx, struct ggml_tensor * q, struct ggml_tensor * pool,
                                        struct ggml_tensor * table, struct ggml_tensor * cells,
                                        struct ggml_tensor * order, struct ggml_tensor * mask,
                                        struct ggml_tensor * sinks, const struct ggml_ext_kv_attend_params * params,
                                        const struct ggml_ext_kv_codes * codes) {
    struct {
        struct ggml_ext_kv_attend_params attend;
        struct ggml_ext_kv_cold_params   cold;
    } all = { *params, { 0 } };
    if (codes) {
        all.cold = codes->p;
    }
    struct ggml_tensor * result = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, params->dv, q->ne[2], q->ne[1], q->ne[3]);
    ggml_ext_op_init(result, GGML_EXT_OP_KV_ATTEND, &all, sizeof(all));
    struct ggml_tensor * const sources[] = {
        q,
        pool,
        table,
        cells,
        order,
        mask,
        sinks,
        codes ? codes->pool : NULL,
        codes ? codes->books : NULL,
        codes ? codes->angles : NULL,
    };
    memcpy(result->src, sources, sizeof(sources));
    ggml_ext_op_check(result);
    return result;
}
