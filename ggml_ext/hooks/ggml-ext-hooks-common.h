// What the hook lines in upstream's common/ call. Included by patched upstream sources only.

#ifndef GGML_EXT_HOOKS_COMMON_H
#define GGML_EXT_HOOKS_COMMON_H

#include "common.h"
#include "llama.h"
#include "sampler/chain.h"

#include <stdexcept>

// common_sampler_init, when the chain is complete and `params` have their final values.
inline void ggml_ext_common_chain(llama_sampler * chain, const common_params_sampling & params) {
    ggml_ext_sampler_chain_values values = {};
    values.fused.temperature             = params.temp;
    values.fused.top_k                   = params.top_k;
    values.fused.top_p                   = params.top_p;
    values.fused.min_p                   = params.min_p;
    values.fused.typical_p               = params.typ_p;
    values.fused.min_keep                = params.min_keep;
    values.fused.seed                    = params.seed;
    values.temperature_range             = params.dynatemp_range;
    values.backend                       = params.backend_sampling;
    ggml_ext_sampler_chain(chain, values);
}

// common_sampler_sample, behind a chain: upstream reads the selected candidate without a look at the index.
inline void ggml_ext_common_selected(const llama_token_data_array & candidates) {
    if (candidates.selected < 0) {
        throw std::runtime_error("ggml-ext: no token can be sampled: a logit is NaN or Inf, or all are -Inf");
    }
}

#endif  // GGML_EXT_HOOKS_COMMON_H
