// The paths of fq4.h, one per file: FQ4's here, the other types' in <type>/cpu, for the table in <type>/cpu/<type>.c.

#ifndef GGML_EXT_FQ4_PATHS_CPU_H
#define GGML_EXT_FQ4_PATHS_CPU_H

#include "core/x86.h"
#include "fq4.h"

// NEON with dot products: where the file is compiled for them, or the choice at run time is possible.
#if defined(__aarch64__) && defined(__GNUC__) && \
    (defined(__ARM_FEATURE_DOTPROD) || (defined(__linux__) && !defined(__clang__)))
#    define GGML_EXT_FQ4_HAS_NEON 1
#endif

#ifdef GGML_EXT_X86
#    define GGML_EXT_FQ4_X86_PATHS(apply, type) \
        apply(type, avx512_vnni) GGML_EXT_FQ4_VNNI_PATHS(apply, type) apply(type, avx2)
#else
#    define GGML_EXT_FQ4_X86_PATHS(apply, type)
#endif
#ifdef GGML_EXT_AVX_VNNI
#    define GGML_EXT_FQ4_VNNI_PATHS(apply, type) apply(type, avxvnni)
#else
#    define GGML_EXT_FQ4_VNNI_PATHS(apply, type)
#endif
#ifdef GGML_EXT_FQ4_HAS_NEON
#    define GGML_EXT_FQ4_NEON_PATHS(apply, type) apply(type, neon)
#else
#    define GGML_EXT_FQ4_NEON_PATHS(apply, type)
#endif

// apply(type, path) for every path of a type, fastest first.
#define GGML_EXT_FQ4_PATHS(apply, type)  \
    GGML_EXT_FQ4_X86_PATHS(apply, type)  \
    GGML_EXT_FQ4_NEON_PATHS(apply, type) \
    apply(type, generic)

#define GGML_EXT_FQ4_DECLARE(type, path) extern const struct ggml_ext_fq4_path ggml_ext_##type##_##path;
GGML_EXT_FQ4_PATHS(GGML_EXT_FQ4_DECLARE, fq4)
GGML_EXT_FQ4_PATHS(GGML_EXT_FQ4_DECLARE, fq4_64)
GGML_EXT_FQ4_PATHS(GGML_EXT_FQ4_DECLARE, fq3)
GGML_EXT_FQ4_PATHS(GGML_EXT_FQ4_DECLARE, fq3_64)

// An element of the table.
#define GGML_EXT_FQ4_ENTRY(type, path) &ggml_ext_##type##_##path,

#endif  // GGML_EXT_FQ4_PATHS_CPU_H
