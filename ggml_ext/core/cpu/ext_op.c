#include "ext_op.h"

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"

static const struct ggml_ext_cpu_op * const table[GGML_EXT_OP_COUNT] = {
    [GGML_EXT_OP_SCALE_ADD] = &ggml_ext_cpu_scale_add, [GGML_EXT_OP_KRON] = &ggml_ext_cpu_kron,
    [GGML_EXT_OP_ACT_ROUND] = &ggml_ext_cpu_act_round, [GGML_EXT_OP_SAMPLE] = &ggml_ext_cpu_sample,
    [GGML_EXT_OP_KV_STORE] = &ggml_ext_cpu_kv_store,   [GGML_EXT_OP_KV_ATTEND] = &ggml_ext_cpu_kv_attend,
    [GGML_EXT_OP_KV_SCORE] = &ggml_ext_cpu_kv_score,   [GGML_EXT_OP_KV_CODE] = &ggml_ext_cpu_kv_code,
};

static const struct ggml_ext_cpu_op * ext_op_find(const struct ggml_tensor * dst) {
    return table[ggml_ext_get_op(dst)];
}

void ggml_ext_cpu_compute(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    ext_op_find(dst)->compute(params, dst);
}

// Every graph is planned before it is computed, so this is the one place that looks at a node which no constructor of this
// process has made: it came over RPC, from a newer peer or from one that means harm.
int ggml_ext_cpu_n_tasks(const struct ggml_tensor * dst, int n_threads) {
    const char * fault = ggml_ext_op_fault(dst);
    if (fault != NULL) {
        GGML_ABORT("ggml-ext: the CPU backend refuses sub-op %d (%s) of GGML_OP_EXT, tensor '%s': %s",
                   ggml_ext_get_op(dst), ggml_ext_op_name(ggml_ext_get_op(dst)), dst->name, fault);
    }
    const struct ggml_ext_cpu_op * op = ext_op_find(dst);
    return op->n_tasks ? op->n_tasks(dst, n_threads) : n_threads;
}

size_t ggml_ext_cpu_work_size(const struct ggml_tensor * dst, int n_tasks) {
    if (ggml_is_empty(dst)) {
        return 0;  // neither looked at nor computed
    }
    const struct ggml_ext_cpu_op * op = ext_op_find(dst);
    return op->work_size ? op->work_size(dst, n_tasks) : 0;
}
