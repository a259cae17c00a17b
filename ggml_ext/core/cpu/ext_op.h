// GGML_OP_EXT inside ggml-cpu: the dispatch table that upstream's three switches call.

#ifndef GGML_EXT_OP_CPU_H
#define GGML_EXT_OP_CPU_H

#include "core/ext_op.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

// A sub-op on the CPU. Threads call compute together (params->ith of params->nth).
struct ggml_ext_cpu_op {
    void (*compute)(const struct ggml_compute_params * params, struct ggml_tensor * dst);
    int (*n_tasks)(const struct ggml_tensor * dst, int n_threads);     // NULL: all threads
    size_t (*work_size)(const struct ggml_tensor * dst, int n_tasks);  // bytes of params->wdata; NULL: 0
};

void   ggml_ext_cpu_compute(const struct ggml_compute_params * params, struct ggml_tensor * dst);
int    ggml_ext_cpu_n_tasks(const struct ggml_tensor * dst, int n_threads);
size_t ggml_ext_cpu_work_size(const struct ggml_tensor * dst, int n_tasks);

// One per sub-op, in the sub-op's own file.
extern const struct ggml_ext_cpu_op ggml_ext_cpu_scale_add;
extern const struct ggml_ext_cpu_op ggml_ext_cpu_kron;
extern const struct ggml_ext_cpu_op ggml_ext_cpu_act_round;
extern const struct ggml_ext_cpu_op ggml_ext_cpu_sample;
extern const struct ggml_ext_cpu_op ggml_ext_cpu_kv_store;
extern const struct ggml_ext_cpu_op ggml_ext_cpu_kv_attend;
extern const struct ggml_ext_cpu_op ggml_ext_cpu_kv_score;
extern const struct ggml_ext_cpu_op ggml_ext_cpu_kv_code;

#ifdef __cplusplus
}
#endif

#endif  // GGML_EXT_OP_CPU_H
