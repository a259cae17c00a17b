// Which GGML_OP_FLASH_ATTN_EXT our kernels take, as far as it is the same for all of them. Host code that needs no device.

#pragma once

#include "ggml.h"

#include <initializer_list>

namespace ggml_ext {

inline bool attention_is_aligned(const ggml_tensor * t, size_t bytes) {
    return t->nb[1] % bytes == 0 && t->nb[2] % bytes == 0 && t->nb[3] % bytes == 0 && t->view_offs % bytes == 0;
}

// NULL, or what is wrong with one of K and V.
inline const char * attention_cache_refusal(const ggml_tensor * t, const ggml_tensor * k, const ggml_tensor * q) {
    if (t->type != GGML_TYPE_F16 && t->type != GGML_TYPE_Q8_0 && t->type != GGML_TYPE_Q4_0) {
        return "the type of K or V";
    }
    if (t->nb[0] != ggml_type_size(t->type) || t->nb[1] < ggml_row_size(t->type, t->ne[0]) ||
        !attention_is_aligned(t, t->type == GGML_TYPE_F16 ? 4 : 2)) {
        return "the layout of K or V";
    }
    if (t->ne[0] != q->ne[0] || t->ne[1] != k->ne[1] || t->ne[2] != k->ne[2] || t->ne[3] != q->ne[3]) {
        return "the shape of K or V";
    }
    return nullptr;
}

// NULL, or why no kernel takes the op dst. A kernel may ask for more.
inline const char * attention_refusal(const ggml_tensor * dst) {
    const ggml_tensor *q = dst->src[0], *k = dst->src[1], *v = dst->src[2], *mask = dst->src[3], *sinks = dst->src[4];
    for (const ggml_tensor * t : { k, v }) {
        if (const char * reason = attention_cache_refusal(t, k, q)) {
            return reason;
        }
    }
    if (q->ne[0] != 64 && q->ne[0] != 96 && q->ne[0] != 128 && q->ne[0] != 256) {
        return "the size of heads";
    }
    if (k->ne[2] == 0 || q->ne[2] % k->ne[2] != 0 || q->ne[2] * q->ne[1] > 1 << 24 || k->ne[1] > 1 << 24 ||
        k->ne[2] * q->ne[3] > 65535) {
        return "the number of heads, queries or tokens";
    }
    if (q->type != GGML_TYPE_F32 || q->nb[0] != sizeof(float) || !attention_is_aligned(q, 16) ||
        !ggml_is_contiguous(dst)) {
        return "the layout of Q";
    }
    if (mask && (mask->type != GGML_TYPE_F16 || mask->nb[0] != 2 || mask->ne[0] < k->ne[1] || mask->ne[1] < q->ne[1] ||
                 q->ne[2] % mask->ne[2] != 0 || q->ne[3] % mask->ne[3] != 0)) {
        return "the mask";
    }
    if (sinks && (sinks->type != GGML_TYPE_F32 || !ggml_is_contiguous(sinks))) {
        return "the sinks";
    }
    return nullptr;
}

}  // namespace ggml_ext
