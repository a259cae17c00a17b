// The same for llama.

#ifndef GGML_EXT_HOOKS_LLAMA_H
#define GGML_EXT_HOOKS_LLAMA_H

#include "kv/hooks.h"
#include "transform/hooks.h"
#include "transform/metadata.h"

#endif  // GGML_EXT_HOOKS_LLAMA_H
