#include "ext-op-cpu.h"

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"

static const struct ggml_ext_cpu_op * const table[GGML_EXT_OP_COUNT] = {
    [GGML_EXT_OP_SCALE_ADD] = &ggml_ext_cpu_scale_add,
    [GGML_EXT_OP_KRON]      = &ggml_ext_cpu_kron,
    [GGML_EXT_OP_ACT_ROUND] = &ggml_ext_cpu_act_round,
    [GGML_EXT_OP_SAMPLE]    = &ggml_ext_cpu_sample,
};

// A graph that holds a sub-op we do not have can only come from a newer peer over RPC: stop, by name.
static const struct ggml_ext_cpu_op * find(const struct ggml_tensor * dst) {
    const int32_t sub_op = ggml_ext_get_op(dst);
    if (sub_op < 0 || sub_op >= GGML_EXT_OP_COUNT || table[sub_op] == NULL) {
        GGML_ABORT("ggml-ext: the CPU backend has no sub-op %d (%s) of GGML_OP_EXT, tensor '%s'", sub_op,
                   ggml_ext_op_name(sub_op), dst->name);
    }
    return table[sub_op];
}

void ggml_ext_cpu_compute(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    find(dst)->compute(params, dst);
}

int ggml_ext_cpu_n_tasks(const struct ggml_tensor * dst, int n_threads) {
    const struct ggml_ext_cpu_op * op = find(dst);
    return op->n_tasks ? op->n_tasks(dst, n_threads) : n_threads;
}

size_t ggml_ext_cpu_work_size(const struct ggml_tensor * dst, int n_tasks) {
    const struct ggml_ext_cpu_op * op = find(dst);
    return op->work_size ? op->work_size(dst, n_tasks) : 0;
}
