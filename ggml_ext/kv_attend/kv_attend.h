// GGML_EXT_OP_KV_ATTEND: what constructor and backends share.

#ifndef GGML_EXT_KV_ATTEND_H
#define GGML_EXT_KV_ATTEND_H

#include "core/ext_op.h"

struct ggml_ext_kv_attend_params ggml_ext_kv_attend_params_of(const struct ggml_tensor * dst);

#endif  // GGML_EXT_KV_ATTEND_H
