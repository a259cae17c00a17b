// GGML_EXT_OP_KV_ATTEND: what constructor and backends share.

#ifndef GGML_EXT_KV_ATTEND_H
#define GGML_EXT_KV_ATTEND_H

#include "core/ext_op.h"

struct ggml_ext_kv_attend_params ggml_ext_kv_attend_params_of(const struct ggml_tensor * dst);

// Of codes, which an op with such sources has where src[7] is their pool.
struct ggml_ext_kv_cold_params ggml_ext_kv_attend_cold_of(const struct ggml_tensor * dst);

// What is wrong with parameters and sources as kv_attend has them, or NULL.
const char * ggml_ext_kv_attend_sources_fault(const struct ggml_tensor * dst);

#endif  // GGML_EXT_KV_ATTEND_H
