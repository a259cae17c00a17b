// GGML_OP_FLASH_ATTN_EXT as an attention_prefill: what is taken, and its shapes and addresses.

#pragma once

#include "attention/match.h"
#include "attention/setting.h"
#include "prefill.h"

#include <cstring>

namespace ggml_ext {

// NULL, or why prefill does not take the op.
inline const char * attention_prefill_refusal(const ggml_tensor *                       dst,
                                              const struct ggml_ext_attention_setting & setting) {
    const ggml_tensor *k = dst->src[1], *v = dst->src[2], *mask = dst->src[3];
    if (const char * reason = attention_refusal(dst)) {
        return reason;
    }
    if (!setting.f16 && (k->type == GGML_TYPE_F16 || v->type == GGML_TYPE_F16)) {
        return "one of K and V is f16 (GGML_EXT_ATTN=half/f16 includes it)";
    }
    return mask && mask->ne[2] != 1 ? "a mask for each head" : nullptr;
}

// The problem of an op that is not refused.
inline attention_prefill attention_prefill_of(const ggml_tensor *                       dst,
                                              const struct ggml_ext_attention_setting & setting) {
    const ggml_tensor * mask   = dst->src[3];
    const auto          tensor = [](const ggml_tensor * t) {
        const attention_type type = t->type == GGML_TYPE_Q8_0 ? ATTENTION_Q8_0 :
                                             t->type == GGML_TYPE_Q4_0 ? ATTENTION_Q4_0 :
                                                                         ATTENTION_F16;
        return attention_tensor{ (const char *) t->data, (int64_t) t->nb[1], (int64_t) t->nb[2], (int64_t) t->nb[3],
                                 type };
    };
    attention_prefill p = {};
    p.q                 = tensor(dst->src[0]);
    p.k                 = tensor(dst->src[1]);
    p.v                 = tensor(dst->src[2]);
    p.n_mask_streams    = 1;
    if (mask) {
        p.mask           = tensor(mask);
        p.n_mask_streams = mask->ne[3];
    }
    p.sinks     = dst->src[4] ? (const float *) dst->src[4]->data : nullptr;
    p.out       = (float *) dst->data;
    p.d         = (int) dst->src[0]->ne[0];
    p.n_q       = (int) dst->src[0]->ne[1];
    p.n_kv      = (int) dst->src[1]->ne[1];
    p.heads_kv  = (int) dst->src[1]->ne[2];
    p.gqa       = (int) (dst->src[0]->ne[2] / dst->src[1]->ne[2]);
    p.n_streams = (int) dst->src[0]->ne[3];
    std::memcpy(&p.scale, dst->op_params, 4);
    std::memcpy(&p.max_bias, dst->op_params + 1, 4);
    std::memcpy(&p.softcap, dst->op_params + 2, 4);
    p.full   = setting.mode == GGML_EXT_ATTENTION_FULL && p.d <= 128;
    p.smooth = setting.smooth;
    return p;
}

}  // namespace ggml_ext
