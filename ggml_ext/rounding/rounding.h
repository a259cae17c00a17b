// Shared by the files of this folder.

#ifndef GGML_EXT_ROUNDING_H
#define GGML_EXT_ROUNDING_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>

// The inner loops are plain arithmetic over columns or table rows: the compiler vectorises them for what the
// processor has. The variants differ in speed and in the order of additions.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#    define GGML_EXT_CLONES                                         \
        __attribute__((target_clones("avx512f", "avx2", "default"), \
                       optimize("O3", "associative-math", "no-signed-zeros", "no-trapping-math")))
#else
#    define GGML_EXT_CLONES
#endif

#endif  // GGML_EXT_ROUNDING_H
