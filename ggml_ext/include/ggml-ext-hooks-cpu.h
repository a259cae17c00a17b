// The same for ggml-cpu.

#ifndef GGML_EXT_HOOKS_CPU_H
#define GGML_EXT_HOOKS_CPU_H

#include "ops/ext-op-cpu.h"
#include "types/fq4-cpu.h"

#endif  // GGML_EXT_HOOKS_CPU_H
