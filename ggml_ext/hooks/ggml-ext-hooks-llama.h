// The same for llama.

#ifndef GGML_EXT_HOOKS_LLAMA_H
#define GGML_EXT_HOOKS_LLAMA_H

#include "kv/hooks.h"
#include "transform/hooks.h"
#include "transform/metadata.h"

// The cases of llama_model_ftype_name.
#define GGML_EXT_FTYPE_NAMES             \
    GGML_EXT_FTYPE_NAME(FQ4, "4.3125")   \
    GGML_EXT_FTYPE_NAME(FQ4_64, "4.375") \
    GGML_EXT_FTYPE_NAME(FQ3, "3.3125")   \
    GGML_EXT_FTYPE_NAME(FQ3_64, "3.375")
#define GGML_EXT_FTYPE_NAME(type, bits)                    \
    case LLAMA_FTYPE_MOSTLY_##type:                        \
        name = LLAMA_FTYPE_PREFIX #type " - " bits " bpw"; \
        break;

// The cases of llama_model_loader's guess at the file type.
#define GGML_EXT_FTYPES GGML_EXT_FTYPE(FQ4) GGML_EXT_FTYPE(FQ4_64) GGML_EXT_FTYPE(FQ3) GGML_EXT_FTYPE(FQ3_64)
#define GGML_EXT_FTYPE(type)               \
    case GGML_TYPE_##type:                 \
        ftype = LLAMA_FTYPE_MOSTLY_##type; \
        break;

#endif  // GGML_EXT_HOOKS_LLAMA_H
