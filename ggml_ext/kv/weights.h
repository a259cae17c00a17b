// What a model's file holds for its KV cache beside the weights: probes and codebooks.

#pragma once

#include "ggml-cpp.h"
#include "ggml.h"

#include <vector>

// A buffer of the CPU's memory for a context's tensors; values: the bytes of each, in the context's order. Without alloc
// they have a buffer of no size. Throws std::runtime_error, which names `what`, where the memory cannot be had.
ggml_backend_buffer_ptr ggml_ext_kv_weights(ggml_context * context, const std::vector<std::vector<char>> & values,
                                            bool alloc, const char * what);
