// GGML_EXT_OP_KV_CODE: what constructor and backends share.

#ifndef GGML_EXT_KV_CODE_H
#define GGML_EXT_KV_CODE_H

#include "core/ext_op.h"

struct ggml_ext_kv_code_params ggml_ext_kv_code_params_of(const struct ggml_tensor * dst);

// What is wrong with codes as kv_code and kv_attend have them, or NULL. blocks: behind the pool's.
const char * ggml_ext_kv_cold_fault(const struct ggml_ext_kv_cold_params * p, int64_t dk, int64_t dv, int64_t n_head_kv,
                                    const struct ggml_tensor * pool, const struct ggml_tensor * books,
                                    const struct ggml_tensor * angles);

#endif  // GGML_EXT_KV_CODE_H
