#include "ext-op-new.h"
#include "ggml-impl.h"

struct ggml_tensor * ggml_ext_sample(struct ggml_context * ctx, struct ggml_tensor * logits,
                                     struct ggml_tensor * parameters, struct ggml_tensor * ids) {
    GGML_ASSERT(sizeof(struct ggml_ext_sample_params) == GGML_EXT_SAMPLE_WORDS * sizeof(int32_t));
    GGML_ASSERT(logits->type == GGML_TYPE_F32 && parameters->type == GGML_TYPE_I32);
    GGML_ASSERT(logits->ne[0] >= 1 && logits->ne[0] <= GGML_EXT_SAMPLE_MAX_VOCAB);
    GGML_ASSERT(ggml_nrows(logits) == logits->ne[1] && ggml_nrows(parameters) == parameters->ne[1]);
    GGML_ASSERT(parameters->ne[0] == GGML_EXT_SAMPLE_WORDS && parameters->ne[1] == logits->ne[1]);
    GGML_ASSERT(logits->nb[0] == sizeof(float) && parameters->nb[0] == sizeof(int32_t));
    GGML_ASSERT(!ids ||
                (ids->type == GGML_TYPE_I32 && ggml_are_same_shape(ids, logits) && ids->nb[0] == sizeof(int32_t)));
    struct ggml_tensor * result = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, logits->ne[1]);
    ggml_ext_op_init(result, GGML_EXT_OP_SAMPLE, NULL, 0);
    result->src[0] = logits;
    result->src[1] = parameters;
    result->src[2] = ids;
    return result;
}
