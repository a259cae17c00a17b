// Names and the constructor helper of the GGML_OP_EXT sub-ops.

#include "ext_op.h"

#include "ext_op_new.h"
#include "ggml-impl.h"

static const struct {
    const char * name;
    const char * (*fault)(const struct ggml_tensor * dst);
} sub_ops[GGML_EXT_OP_COUNT] = {
    [GGML_EXT_OP_SCALE_ADD] = { "scale_add", ggml_ext_scale_add_fault },
    [GGML_EXT_OP_KRON]      = { "kron",      ggml_ext_kron_fault      },
    [GGML_EXT_OP_ACT_ROUND] = { "act_round", ggml_ext_act_round_fault },
    [GGML_EXT_OP_SAMPLE]    = { "sample",    ggml_ext_sample_fault    },
    [GGML_EXT_OP_KV_STORE]  = { "kv_store",  ggml_ext_kv_store_fault  },
    [GGML_EXT_OP_KV_ATTEND] = { "kv_attend", ggml_ext_kv_attend_fault },
    [GGML_EXT_OP_KV_SCORE]  = { "kv_score",  ggml_ext_kv_score_fault  },
    [GGML_EXT_OP_KV_CODE]   = { "kv_code",   ggml_ext_kv_code_fault   },
};

static bool ext_op_exists(int32_t sub_op) {
    return sub_op >= 0 && sub_op < GGML_EXT_OP_COUNT;
}

const char * ggml_ext_op_name(int32_t sub_op) {
    return ext_op_exists(sub_op) ? sub_ops[sub_op].name : "unknown";
}

const char * ggml_ext_op_fault(const struct ggml_tensor * tensor) {
    const int32_t sub_op = ggml_ext_get_op(tensor);
    return ext_op_exists(sub_op) ? sub_ops[sub_op].fault(tensor) : "no such sub-op";
}

void ggml_ext_op_check(const struct ggml_tensor * result) {
    const char * fault = ggml_ext_op_fault(result);
    if (fault != NULL) {
        GGML_ABORT("ggml-ext: %s", fault);
    }
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
