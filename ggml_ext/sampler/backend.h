// The fused sampler as a node of llama.cpp's graph (GGML_EXT_OP_SAMPLE): the ways of a sampler's callbacks for backend
// sampling, docs/sampling.md.

#pragma once

#include "ggml-backend.h"
#include "ggml-ext.h"

#include <cstdint>

struct llama_sampler_data;

namespace ggml_ext_sampling {

// Why a buffer type's device cannot run these stages, or null.
const char * backend_obstacle(const ggml_ext_sampler_params & params, ggml_backend_buffer_type_t buft);

// Adds the node that samples data->logits. Only the token leaves the device, and one logit: where no token was drawn
// (NaN), llama_sampler_sample then finds a candidate but no choice and ends the process, and does not read logits that
// nobody has copied. Returns the input that backend_set writes before each run.
ggml_tensor * backend_add(ggml_context * ctx, llama_sampler_data * data);

// u: as of a draw on the processor.
void backend_set(ggml_tensor * parameters, const ggml_ext_sampler_params & params, double u);

}  // namespace ggml_ext_sampling
