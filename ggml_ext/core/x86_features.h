// What the processor has and the operating system saves, by CPUID. In ggml-base, so that ggml-cpu, each of its
// variants and llama share the one answer. Not __builtin_cpu_supports: Clang before 18 refuses "f16c" and "avxvnni"
// there, GCC before 11 "f16c".

#ifndef GGML_EXT_X86_FEATURES_H
#define GGML_EXT_X86_FEATURES_H

#include "ggml.h"

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

// Each asks for all that the attribute of the same name in x86.h switches on. Defined on x86-64 only.
GGML_API bool ggml_ext_has_avx2(void);
GGML_API bool ggml_ext_has_avx_vnni(void);
GGML_API bool ggml_ext_has_avx512(void);
GGML_API bool ggml_ext_has_avx512_vnni(void);
GGML_API bool ggml_ext_has_avx512_vbmi(void);

#ifdef __cplusplus
}
#endif

#endif  // GGML_EXT_X86_FEATURES_H
