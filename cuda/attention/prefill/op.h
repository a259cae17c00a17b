// GGML_OP_FLASH_ATTN_EXT as an attention_prefill: what is taken, and its shapes and addresses.

#pragma once

#include "attention/setting.h"
#include "ggml.h"
#include "prefill.h"

#include <cstring>

namespace ggml_ext {

inline bool attention_type_of(ggml_type type, attention_type & ours) {
    ours = type == GGML_TYPE_Q8_0 ? ATTENTION_Q8_0 : type == GGML_TYPE_Q4_0 ? ATTENTION_Q4_0 : ATTENTION_F16;
    return type == GGML_TYPE_Q8_0 || type == GGML_TYPE_Q4_0 || type == GGML_TYPE_F16;
}

inline bool attention_aligned(const ggml_tensor * t, size_t bytes) {
    return t->nb[1] % bytes == 0 && t->nb[2] % bytes == 0 && t->nb[3] % bytes == 0 && t->view_offs % bytes == 0;
}

// NULL, or why prefill does not take the op. The head size is for the caller to judge.
inline const char * attention_refusal(const ggml_tensor * dst, const struct ggml_ext_attention_setting & setting) {
    const ggml_tensor * q     = dst->src[0];
    const ggml_tensor * k     = dst->src[1];
    const ggml_tensor * v     = dst->src[2];
    const ggml_tensor * mask  = dst->src[3];
    const ggml_tensor * sinks = dst->src[4];
    attention_type      type;
    for (const ggml_tensor * t : { k, v }) {
        if (!attention_type_of(t->type, type)) {
            return "the type of K or V";
        }
        if (t->type == GGML_TYPE_F16 && !setting.f16) {
            return "one of K and V is f16 (GGML_EXT_ATTN=half/f16 includes it)";
        }
        if (t->nb[0] != ggml_type_size(t->type) || !attention_aligned(t, t->type == GGML_TYPE_F16 ? 4 : 2)) {
            return "the layout of K or V";
        }
        if (t->ne[0] != q->ne[0] || t->ne[1] != k->ne[1] || t->ne[2] != k->ne[2] || t->ne[3] != q->ne[3]) {
            return "the shape of K or V";
        }
    }
    if (q->ne[2] % k->ne[2] != 0 || q->ne[2] * q->ne[1] > 1 << 24 || k->ne[1] > 1 << 24 ||
        k->ne[2] * q->ne[3] > 65535) {
        return "the number of heads, queries or tokens";
    }
    if (q->type != GGML_TYPE_F32 || q->nb[0] != sizeof(float) || !attention_aligned(q, 16) ||
        !ggml_is_contiguous(dst)) {
        return "the layout of Q";
    }
    if (mask && (mask->type != GGML_TYPE_F16 || mask->nb[0] != 2 || mask->ne[0] < k->ne[1] || mask->ne[1] < q->ne[1] ||
                 mask->ne[2] != 1 || q->ne[3] % mask->ne[3] != 0)) {
        return "the mask";
    }
    if (sinks && sinks->type != GGML_TYPE_F32) {
        return "the sinks";
    }
    return nullptr;
}

// The problem of an op that is not refused.
inline attention_prefill attention_prefill_of(const ggml_tensor *                       dst,
                                              const struct ggml_ext_attention_setting & setting) {
    const ggml_tensor * mask   = dst->src[3];
    const auto          tensor = [](const ggml_tensor * t) {
        attention_tensor ours = { (const char *) t->data, (int64_t) t->nb[1], (int64_t) t->nb[2], (int64_t) t->nb[3],
                                  ATTENTION_F16 };
        attention_type_of(t->type, ours.type);
        return ours;
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
