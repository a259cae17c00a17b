// GGML_EXT_SAMPLER in the environment: the fused sampler in the sampler chains of upstream's tools.

#pragma once

#include "ggml-ext.h"

struct llama_sampler;

// Whether value is one that GGML_EXT_SAMPLER may have: "off" or "fused".
bool ggml_ext_sampler_known(const char * value);

// What the samplers of a chain were made with; upstream has no functions that tell.
struct ggml_ext_sampler_chain_values {
    ggml_ext_sampler_params fused;              // but for its stages: the chain has them
    float                   temperature_range;  // of temp-ext; above 0 its temperature follows the entropy
    bool                    backend;            // the chain is to run on a backend
};

// A finished chain, before its first use. Under GGML_EXT_SAMPLER=fused, its end becomes one fused sampler: upstream's
// dist with the top-k, typical, top-p, min-p and temperature samplers before it. What stands before these stays. A
// chain with another sampler among or behind them stays as it is; the log tells why, each reason once. Unset or "off":
// does nothing. With another value no model loads (settings.h).
GGML_EXT_API void ggml_ext_sampler_chain(struct llama_sampler * chain, const ggml_ext_sampler_chain_values & values);
