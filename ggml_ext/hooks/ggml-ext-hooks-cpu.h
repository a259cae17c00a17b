// What the hook lines in upstream's ggml-cpu.c and ggml-cpu.cpp call or include. Included by these patched sources only.

#ifndef GGML_EXT_HOOKS_CPU_H
#define GGML_EXT_HOOKS_CPU_H

#include "core/cpu/ext_op.h"
#include "core/cpu/override.h"
#include "fq3/cpu/fq3.h"
#include "fq3_64/cpu/fq3_64.h"
#include "fq4/cpu/fq4.h"
#include "fq4_64/cpu/fq4_64.h"

#endif  // GGML_EXT_HOOKS_CPU_H
