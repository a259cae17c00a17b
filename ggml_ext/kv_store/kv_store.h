// GGML_EXT_OP_KV_STORE: what constructor and backends share.

#ifndef GGML_EXT_KV_STORE_H
#define GGML_EXT_KV_STORE_H

#include "core/ext_op.h"

// In op_params behind the sub-op id.
struct ggml_ext_kv_store_params {
    int32_t type;    // enum ggml_type of the rows
    int32_t offset;  // of the rows in a block, bytes
    int32_t score;   // of the scores
};

struct ggml_ext_kv_store_params ggml_ext_kv_store_params_of(const struct ggml_tensor * dst);

#endif  // GGML_EXT_KV_STORE_H
