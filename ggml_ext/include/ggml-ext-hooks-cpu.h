// What the hook lines in upstream's ggml-cpu.c and ggml-cpu.cpp call or include. Included by these patched sources only.

#ifndef GGML_EXT_HOOKS_CPU_H
#define GGML_EXT_HOOKS_CPU_H

#include "ops/ext-op-cpu.h"
#include "ops/override-cpu.h"
#include "types/fq4-cpu.h"

#endif  // GGML_EXT_HOOKS_CPU_H
