// Names and the constructor helper of the GGML_OP_EXT sub-ops.

#include "ext-op.h"

#include "ext-op-new.h"
#include "ggml-impl.h"

static const char * const names[GGML_EXT_OP_COUNT] = {
    [GGML_EXT_OP_SCALE_ADD] = "scale_add",
    [GGML_EXT_OP_KRON]      = "kron",
    [GGML_EXT_OP_ACT_ROUND] = "act_round",
    [GGML_EXT_OP_SAMPLE]    = "sample",
};

const char * ggml_ext_op_name(int32_t sub_op) {
    return sub_op >= 0 && sub_op < GGML_EXT_OP_COUNT ? names[sub_op] : "unknown";
}

void ggml_ext_op_init(struct ggml_tensor * result, enum ggml_ext_op sub_op, const void * params, size_t size) {
    GGML_ASSERT(size + sizeof(int32_t) <= GGML_MAX_OP_PARAMS);
    const int32_t id = sub_op;
    result->op       = GGML_OP_EXT;
    memcpy(result->op_params, &id, sizeof(id));
    if (size > 0) {
        memcpy(result->op_params + 1, params, size);
    }
    ggml_format_name(result, "ext_%s", ggml_ext_op_name(id));
}
