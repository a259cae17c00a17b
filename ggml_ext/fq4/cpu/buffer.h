// Memory for FQ4 weights. llama.cpp's loader copies them there in place of mapping the file, as it does for the types
// that upstream repacks (--no-repack turns both off). The bytes are the file's, in memory that the kernel may back
// with huge pages: a product with one column reads all weights once, and with pages of 4 KiB waits for their
// addresses. docs/fq4.md says what it gains and costs.

#ifndef GGML_EXT_FQ4_BUFFER_CPU_H
#define GGML_EXT_FQ4_BUFFER_CPU_H

#include "ggml-backend.h"

#ifdef __cplusplus
extern "C" {
#endif

// NULL without memory.
ggml_backend_buffer_t ggml_ext_fq4_buffer_alloc(ggml_backend_buffer_type_t type, size_t size);

#ifdef __cplusplus
}
#endif

#endif  // GGML_EXT_FQ4_BUFFER_CPU_H
