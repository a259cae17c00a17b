#include "core/ext_op_new.h"
#include "ggml-impl.h"

// A matrix whose values of a row are adjacent.
static bool sample_is_table(const struct ggml_tensor * t, enum ggml_type type) {
    return t != NULL && t->type == type && t->ne[2] == 1 && t->ne[3] == 1 && t->nb[0] == ggml_type_size(type);
}

const char * ggml_ext_sample_fault(const struct ggml_tensor * dst) {
    const struct ggml_tensor * logits     = dst->src[0];
    const struct ggml_tensor * parameters = dst->src[1];
    const struct ggml_tensor * ids        = dst->src[2];
    if (!sample_is_table(logits, GGML_TYPE_F32) || logits->ne[0] < 1 || logits->ne[0] > GGML_EXT_SAMPLE_MAX_VOCAB) {
        return "sample: logits is F32 [n_vocab, n_rows] with adjacent values and a vocabulary of 1 to 2^22";
    }
    if (!sample_is_table(parameters, GGML_TYPE_I32) || parameters->ne[0] != GGML_EXT_SAMPLE_WORDS ||
        parameters->ne[1] != logits->ne[1]) {
        return "sample: parameters is I32 with 8 adjacent words for each row of logits";
    }
    if (ids != NULL && (!sample_is_table(ids, GGML_TYPE_I32) || !ggml_are_same_shape(ids, logits))) {
        return "sample: ids is I32 of the shape of logits with adjacent values";
    }
    return dst->type == GGML_TYPE_I32 && ggml_is_contiguous(dst) && dst->ne[0] == logits->ne[1] &&
                   ggml_nrows(dst) == 1 ?
               NULL :
               "sample: the result is I32, one value for each row of logits";
}

struct ggml_tensor * ggml_ext_sample(struct ggml_context * ctx, struct ggml_tensor * logits,
                                     struct ggml_tensor * parameters, struct ggml_tensor * ids) {
    static_assert(sizeof(struct ggml_ext_sample_params) == GGML_EXT_SAMPLE_WORDS * sizeof(int32_t), "words of a row");
    struct ggml_tensor * result = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, logits->ne[1]);
    ggml_ext_op_init(result, GGML_EXT_OP_SAMPLE, NULL, 0);
    result->src[0] = logits;
    result->src[1] = parameters;
    result->src[2] = ids;
    ggml_ext_op_check(result);
    return result;
}
