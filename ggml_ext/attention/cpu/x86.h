// Attention tiles on x86: what the files of both instruction sets share. They define TARGET, the function attributes.

#ifndef GGML_EXT_ATTENTION_X86_CPU_H
#define GGML_EXT_ATTENTION_X86_CPU_H

#include "attention.h"
#include "core/x86.h"

#ifdef GGML_EXT_X86

// Row counts and planes are constants where a kernel is expanded.
#    define EXPAND TARGET static inline __attribute__((always_inline))
#    define TILE   GGML_EXT_ATTENTION_TILE
#    define GROUP  GGML_EXT_ATTENTION_GROUP
#    define BATCH  GGML_EXT_ATTENTION_BATCH

// f(..., number of rows, planes), the numbers as constants.
#    define WITH_CONSTANTS(n_rows, planes, f, ...) \
        switch ((n_rows) * 2 + (planes) - 1) {     \
            case 2:                                \
                f(__VA_ARGS__, 1, 1);              \
                break;                             \
            case 3:                                \
                f(__VA_ARGS__, 1, 2);              \
                break;                             \
            case 4:                                \
                f(__VA_ARGS__, 2, 1);              \
                break;                             \
            case 5:                                \
                f(__VA_ARGS__, 2, 2);              \
                break;                             \
            case 6:                                \
                f(__VA_ARGS__, 3, 1);              \
                break;                             \
            case 7:                                \
                f(__VA_ARGS__, 3, 2);              \
                break;                             \
            case 8:                                \
                f(__VA_ARGS__, 4, 1);              \
                break;                             \
            case 9:                                \
                f(__VA_ARGS__, 4, 2);              \
                break;                             \
        }

// As in struct ggml_ext_attention_path, for both.
void ggml_ext_attention_scales_avx2(int n_blocks, size_t block_size, const char * const * rows, float * out);

#endif  // GGML_EXT_X86

#endif  // GGML_EXT_ATTENTION_X86_CPU_H
