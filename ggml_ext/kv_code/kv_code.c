#include "kv_code.h"

#include "cold.h"
#include "core/ext_op_new.h"
#include "ggml-impl.h"

#include <string.h>

struct ggml_ext_kv_code_params ggml_ext_kv_code_params_of(const struct ggml_tensor * dst) {
    struct ggml_ext_kv_code_params params;
    memcpy(&params, dst->op_params + 1, sizeof(params));
    return params;
}

static bool kv_code_is_head(int64_t d, int64_t channels) {
    return d > 0 && d <= 1024 && d % 32 == 0 && d % channels == 0;
}

const char * ggml_ext_kv_cold_fault(const struct ggml_ext_kv_cold_params * p, int64_t dk, int64_t dv, int64_t n_head_kv,
                                    const struct ggml_tensor * pool, const struct ggml_tensor * books,
                                    const struct ggml_tensor * angles) {
    if ((p->channels != 4 && p->channels != 8) || !kv_code_is_head(dk, p->channels) ||
        !kv_code_is_head(dv, p->channels)) {
        return "kv_code: codes stand for 4 or 8 channels, and heads of K and V have at most 1024, a multiple of 32";
    }
    if (!ggml_ext_kv_is_pool(pool, ggml_ext_kv_cold_block_of(dk, dv, p->channels, false).size)) {
        return "kv_code: the codes' pool is I8 [block, n_blocks], contiguous, blocks of a multiple of 64 bytes that "
               "the codes fit in";
    }
    if (books == NULL || books->type != GGML_TYPE_I8 || !ggml_is_contiguous(books) || books->ne[1] != n_head_kv ||
        books->ne[0] != (int64_t) ggml_ext_kv_books_of(dk, dv, p->channels).size || books->ne[2] != 1 ||
        books->ne[3] != 1) {
        return "kv_code: books is I8 [bytes of a head, n_head_kv], contiguous";
    }
    if (p->n_rot < 0 || p->n_rot > dk || p->n_rot % 2 != 0 || !(p->length > 0 && p->length < 1e9f)) {
        return "kv_code: RoPE turns an even number of K's channels and lengthens them by a finite factor";
    }
    if (p->n_rot > 0 &&
        (angles == NULL || angles->type != GGML_TYPE_F32 || !ggml_is_contiguous(angles) || angles->ne[0] != p->n_rot ||
         angles->ne[1] != 2 * GGML_EXT_KV_TURN || angles->ne[2] != 1 || angles->ne[3] != 1)) {
        return "kv_code: angles is F32 [n_rot, 8192], contiguous";
    }
    return NULL;
}

const char * ggml_ext_kv_code_fault(const struct ggml_tensor * dst) {
    const struct ggml_ext_kv_code_params p = ggml_ext_kv_code_params_of(dst);

    const struct ggml_tensor *     pool  = dst->src[0];
    const struct ggml_tensor *     rows  = dst->src[1];
    const struct ggml_tensor *     moves = dst->src[2];
    const struct ggml_tensor *     books = dst->src[3];
    const int64_t                  heads = books ? books->ne[1] : 0;
    const char *                   fault = ggml_ext_kv_cold_fault(&p.cold, p.dk, p.dv, heads, pool, books, dst->src[4]);
    const struct ggml_ext_kv_block block =
        ggml_ext_kv_block_of(GGML_TYPE_Q8_0, p.dk, GGML_TYPE_Q8_0, p.dv, p.scored != 0);
    if (fault != NULL) {
        return fault;
    }
    if (p.scored != 0 &&
        !ggml_ext_kv_is_pool(pool, ggml_ext_kv_cold_block_of(p.dk, p.dv, p.cold.channels, true).size)) {
        return "kv_code: the scores fit in a block of codes";
    }
    if (!ggml_ext_kv_is_pool(rows, block.size)) {
        return "kv_code: the rows' pool is I8 [block, n_blocks], contiguous, blocks of a multiple of 64 bytes that the "
               "q8_0 rows fit in";
    }
    if (moves == NULL || moves->type != GGML_TYPE_I32 || !ggml_is_contiguous(moves) || moves->ne[0] != 3 ||
        moves->ne[2] != 1 || moves->ne[3] != 1) {
        return "kv_code: moves is I32 [3, n_moves], contiguous";
    }
    return ggml_ext_kv_is_view(dst, pool) ? NULL : "kv_code: the result is a view of the codes' pool";
}

struct ggml_tensor * ggml_ext_kv_code(struct ggml_context * ctx, struct ggml_tensor * pool, struct ggml_tensor * rows,
                                      struct ggml_tensor * moves, struct ggml_tensor * books,
                                      struct ggml_tensor * angles, const struct ggml_ext_kv_code_params * params) {
    struct ggml_tensor * result = ggml_view_tensor(ctx, pool);
    ggml_ext_op_init(result, GGML_EXT_OP_KV_CODE, params, sizeof(*params));
    struct ggml_tensor * const sources[] = { pool, rows, moves, books, angles };
    memcpy(result->src, sources, sizeof(sources));
    ggml_ext_op_check(result);
    return result;
}
