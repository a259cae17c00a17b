// The same for llama.

#ifndef GGML_EXT_HOOKS_LLAMA_H
#define GGML_EXT_HOOKS_LLAMA_H

#include "llama/metadata.h"
#include "llama/transform-hooks.h"

#endif  // GGML_EXT_HOOKS_LLAMA_H
