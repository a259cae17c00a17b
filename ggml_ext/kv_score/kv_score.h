// GGML_EXT_OP_KV_SCORE: what constructor and backends share.

#ifndef GGML_EXT_KV_SCORE_H
#define GGML_EXT_KV_SCORE_H

#include "core/ext_op.h"

struct ggml_ext_kv_score_params ggml_ext_kv_score_params_of(const struct ggml_tensor * dst);

#endif  // GGML_EXT_KV_SCORE_H
