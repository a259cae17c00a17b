// What the hook lines in upstream's files call or include. Included by patched upstream sources only.

#ifndef GGML_EXT_HOOKS_H
#define GGML_EXT_HOOKS_H

#include "ops/ext-op.h"
#include "types/fq4.h"

#endif  // GGML_EXT_HOOKS_H
