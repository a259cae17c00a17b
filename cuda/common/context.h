// What we keep for a context of the CUDA backend.

#ifndef GGML_EXT_CUDA_CONTEXT_H
#define GGML_EXT_CUDA_CONTEXT_H

#include "activation/slots.h"
#include "attention/setting.h"
#include "common.cuh"

#include <set>

struct ggml_ext_cuda_state {
    ggml_ext_activation_slots         streams[GGML_CUDA_MAX_STREAMS];  // streams run side by side
    std::set<const ggml_tensor *>     unwritten;                       // of this graph: they exist in int8 only
    struct ggml_ext_attention_setting attention;                       // that the captured graphs were made with
};

// Of the context; it stays where it is until ggml_ext_cuda_free.
ggml_ext_cuda_state & ggml_ext_cuda_state_of(const ggml_backend_cuda_context & ctx);

#endif  // GGML_EXT_CUDA_CONTEXT_H
