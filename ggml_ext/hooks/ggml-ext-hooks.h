// What the hook lines in upstream's files call or include. Included by patched upstream sources only.

#ifndef GGML_EXT_HOOKS_H
#define GGML_EXT_HOOKS_H

#include "core/ext_op.h"
#include "fq4/fq4.h"
#include "fq4_64/fq4_64.h"

#endif  // GGML_EXT_HOOKS_H
