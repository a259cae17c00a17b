// The paths of fq4.h, one per file, for the table in fq4.c.

#ifndef GGML_EXT_FQ4_PATHS_CPU_H
#define GGML_EXT_FQ4_PATHS_CPU_H

#include "core/x86.h"
#include "fq4.h"

// NEON with dot products: where the file is compiled for them, or the choice at run time is possible.
#if defined(__aarch64__) && defined(__GNUC__) && \
    (defined(__ARM_FEATURE_DOTPROD) || (defined(__linux__) && !defined(__clang__)))
#    define GGML_EXT_FQ4_HAS_NEON 1
#endif

extern const struct ggml_ext_fq4_path ggml_ext_fq4_avx512_vnni;  // avx512.c
extern const struct ggml_ext_fq4_path ggml_ext_fq4_avxvnni;      // avxvnni.c
extern const struct ggml_ext_fq4_path ggml_ext_fq4_avx2;         // avx2.c
extern const struct ggml_ext_fq4_path ggml_ext_fq4_neon;         // neon.c
extern const struct ggml_ext_fq4_path ggml_ext_fq4_generic;      // generic.c

#endif                                                           // GGML_EXT_FQ4_PATHS_CPU_H
