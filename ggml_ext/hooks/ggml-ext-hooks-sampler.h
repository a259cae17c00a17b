// What the hook lines in upstream's src/llama-sampler.cpp call. Included by that patched source only.

#ifndef GGML_EXT_HOOKS_SAMPLER_H
#define GGML_EXT_HOOKS_SAMPLER_H

#include "ggml-ext.h"
#include "llama.h"

// llama_sampler_sample: the token where smpl is the fused sampler or a chain of it alone, which needs no candidates.
// Negative otherwise, and where no token can be sampled: upstream's way then ends with its own message.
inline llama_token ggml_ext_sampler_alone(llama_sampler * smpl, const float * logits, int32_t n_vocab) {
    if (llama_sampler_chain_get(smpl, -1)) {
        if (llama_sampler_chain_n(smpl) != 1) {
            return -1;
        }
        smpl = llama_sampler_chain_get(smpl, 0);
    }
    return ggml_ext_sampler_sample_logits(smpl, logits, n_vocab);
}

#endif  // GGML_EXT_HOOKS_SAMPLER_H
