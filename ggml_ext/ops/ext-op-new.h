// For the constructors of the sub-ops, one file each in this folder.

#ifndef GGML_EXT_OP_NEW_H
#define GGML_EXT_OP_NEW_H

#include "ext-op.h"

#include <stddef.h>

// Makes a fresh tensor the result of a sub-op: op, id, name, and size bytes of the sub-op's own
// parameters from op_params[1] on.
void ggml_ext_op_init(struct ggml_tensor * result, enum ggml_ext_op sub_op, const void * params, size_t size);

#endif  // GGML_EXT_OP_NEW_H
