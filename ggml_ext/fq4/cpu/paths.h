// The paths of fq4.h, one per file: FQ4's here, FQ4_64's in fq4_64/cpu, for the tables in fq4.c and fq4_64.c.

#ifndef GGML_EXT_FQ4_PATHS_CPU_H
#define GGML_EXT_FQ4_PATHS_CPU_H

#include "core/x86.h"
#include "fq4.h"

// NEON with dot products: where the file is compiled for them, or the choice at run time is possible.
#if defined(__aarch64__) && defined(__GNUC__) && \
    (defined(__ARM_FEATURE_DOTPROD) || (defined(__linux__) && !defined(__clang__)))
#    define GGML_EXT_FQ4_HAS_NEON 1
#endif

extern const struct ggml_ext_fq4_path ggml_ext_fq4_avx512_vnni;
extern const struct ggml_ext_fq4_path ggml_ext_fq4_avxvnni;
extern const struct ggml_ext_fq4_path ggml_ext_fq4_avx2;
extern const struct ggml_ext_fq4_path ggml_ext_fq4_neon;
extern const struct ggml_ext_fq4_path ggml_ext_fq4_generic;
extern const struct ggml_ext_fq4_path ggml_ext_fq4_64_avx512_vnni;
extern const struct ggml_ext_fq4_path ggml_ext_fq4_64_avxvnni;
extern const struct ggml_ext_fq4_path ggml_ext_fq4_64_avx2;
extern const struct ggml_ext_fq4_path ggml_ext_fq4_64_neon;
extern const struct ggml_ext_fq4_path ggml_ext_fq4_64_generic;

#endif  // GGML_EXT_FQ4_PATHS_CPU_H
