// The paths of fq4-cpu.h, one per file, for the table in fq4-cpu.c.

#ifndef GGML_EXT_FQ4_PATHS_CPU_H
#define GGML_EXT_FQ4_PATHS_CPU_H

#include "fq4-cpu.h"

extern const struct ggml_ext_fq4_path ggml_ext_fq4_avx512_vnni;  // fq4-avx512-cpu.c
extern const struct ggml_ext_fq4_path ggml_ext_fq4_avx2;         // fq4-avx2-cpu.c
extern const struct ggml_ext_fq4_path ggml_ext_fq4_generic;      // fq4-generic-cpu.c

#endif                                                           // GGML_EXT_FQ4_PATHS_CPU_H
