// The paths of fq4-cpu.h, one per file, for the table in fq4-cpu.c.

#ifndef GGML_EXT_FQ4_PATHS_CPU_H
#define GGML_EXT_FQ4_PATHS_CPU_H

#include "fq4-cpu.h"
#include "ops/x86.h"

// NEON with dot products: where the file is compiled for them, or the choice at run time is possible.
#if defined(__aarch64__) && defined(__GNUC__) && \
    (defined(__ARM_FEATURE_DOTPROD) || (defined(__linux__) && !defined(__clang__)))
#    define GGML_EXT_FQ4_HAS_NEON 1
#endif

extern const struct ggml_ext_fq4_path ggml_ext_fq4_avx512_vnni;  // fq4-avx512-cpu.c
extern const struct ggml_ext_fq4_path ggml_ext_fq4_avxvnni;      // fq4-avxvnni-cpu.c
extern const struct ggml_ext_fq4_path ggml_ext_fq4_avx2;         // fq4-avx2-cpu.c
extern const struct ggml_ext_fq4_path ggml_ext_fq4_neon;         // fq4-neon-cpu.c
extern const struct ggml_ext_fq4_path ggml_ext_fq4_generic;      // fq4-generic-cpu.c

#endif                                                           // GGML_EXT_FQ4_PATHS_CPU_H
