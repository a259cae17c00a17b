// For the constructors of the sub-ops, one file each in this folder.

#ifndef GGML_EXT_OP_NEW_H
#define GGML_EXT_OP_NEW_H

#include "ext_op.h"

#include <stddef.h>

// Makes a fresh tensor the result of a sub-op: op, id, name, and size bytes of the sub-op's own
// parameters from op_params[1] on.
void ggml_ext_op_init(struct ggml_tensor * result, enum ggml_ext_op sub_op, const void * params, size_t size);

// Aborts with ggml_ext_op_fault's reason if there is one. The last call of a constructor.
void ggml_ext_op_check(const struct ggml_tensor * result);

// What is wrong with a tensor whose sub-op id is the function's, or NULL: see ggml_ext_op_fault.
const char * ggml_ext_scale_add_fault(const struct ggml_tensor * dst);
const char * ggml_ext_kron_fault(const struct ggml_tensor * dst);
const char * ggml_ext_act_round_fault(const struct ggml_tensor * dst);
const char * ggml_ext_sample_fault(const struct ggml_tensor * dst);
const char * ggml_ext_kv_store_fault(const struct ggml_tensor * dst);
const char * ggml_ext_kv_attend_fault(const struct ggml_tensor * dst);
const char * ggml_ext_kv_score_fault(const struct ggml_tensor * dst);
const char * ggml_ext_kv_code_fault(const struct ggml_tensor * dst);

#endif  // GGML_EXT_OP_NEW_H
