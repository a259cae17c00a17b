// From the op to the kernels' arguments, on the host. Includes nothing of CUDA: the emulator's test takes the same way.

#pragma once

#include "attention/match.h"
#include "shape.h"

#include <cstring>

namespace ggml_ext {

inline cache_type cache_type_of(const ggml_tensor * t) {
    return t->type == GGML_TYPE_Q8_0 ? CACHE_Q8_0 : CACHE_Q4_0;
}

// Rows must start where the kernel's copies expect them, and 16 tokens lie within 2 GiB.
inline bool attention_decode_is_cache(const ggml_tensor * t) {
    return (t->type == GGML_TYPE_Q8_0 || t->type == GGML_TYPE_Q4_0) && t->nb[1] < size_t(1) << 26 &&
           attention_is_aligned(t, size_t(cache_row_align(cache_type_of(t), int(t->ne[0]))));
}

inline size_t attention_decode_shared_bytes(const ggml_tensor * dst) {
    const ggml_tensor *q = dst->src[0], *k = dst->src[1], *v = dst->src[2];
    const int          dim  = int(k->ne[0]);
    const int          rows = int(q->ne[2] / k->ne[2] * q->ne[1]);
    return decode_shared_bytes(cache_type_of(k), cache_type_of(v), dim, decode_groups(rows, dim));
}

// Whether the kernels compute dst, a FLASH_ATTN_EXT, where a block may have block_shared bytes of shared memory.
inline bool attention_decode_takes(const ggml_tensor * dst, size_t block_shared) {
    const ggml_tensor *q = dst->src[0], *mask = dst->src[3];
    return !attention_refusal(dst) && q->ne[1] <= decode_max_queries && attention_decode_is_cache(dst->src[1]) &&
           attention_decode_is_cache(dst->src[2]) && (!mask || ggml_nbytes(mask) < size_t(1) << 32) &&
           attention_decode_shared_bytes(dst) <= block_shared;
}

// All but sums and totals. n_sm: of the device.
inline attention_decode_args attention_decode_make_args(const ggml_tensor * dst, int n_sm, size_t block_shared) {
    const ggml_tensor *q = dst->src[0], *k = dst->src[1], *v = dst->src[2], *mask = dst->src[3], *sinks = dst->src[4];
    attention_decode_args args = {};
    args.q                     = static_cast<const char *>(q->data);
    args.k                     = static_cast<const char *>(k->data);
    args.v                     = static_cast<const char *>(v->data);
    args.mask                  = mask ? static_cast<const char *>(mask->data) : nullptr;
    args.sinks                 = sinks ? static_cast<const float *>(sinks->data) : nullptr;
    args.out                   = static_cast<float *>(dst->data);
    for (int i = 0; i < GGML_MAX_DIMS; i++) {
        args.nb_q[i]    = int64_t(q->nb[i]);
        args.nb_k[i]    = int64_t(k->nb[i]);
        args.nb_v[i]    = int64_t(v->nb[i]);
        args.nb_mask[i] = mask ? int64_t(mask->nb[i]) : 0;
    }
    args.mask_heads   = mask ? int(mask->ne[2]) : 1;
    args.mask_streams = mask ? int(mask->ne[3]) : 1;
    args.n_kv         = int(k->ne[1]);
    args.n_q          = int(q->ne[1]);
    args.heads_kv     = int(k->ne[2]);
    args.gqa          = int(q->ne[2] / k->ne[2]);
    args.n_streams    = int(q->ne[3]);
    args.dim          = int(k->ne[0]);
    std::memcpy(&args.scale, dst->op_params + 0, sizeof(float));
    std::memcpy(&args.max_bias, dst->op_params + 1, sizeof(float));
    std::memcpy(&args.softcap, dst->op_params + 2, sizeof(float));
    const int groups = decode_groups(args.gqa * args.n_q, args.dim);
    decode_plan(args, decode_slots(n_sm, block_shared, attention_decode_shared_bytes(dst), args.dim, groups));
    return args;
}

// Floats that sums and totals need together.
inline size_t attention_decode_memory(const attention_decode_args & args) {
    return size_t(args.n_out_rows()) * args.n_chunks * (args.dim + 2);
}

// Gives sums and totals their parts of `memory`, aligned to 16 bytes.
inline void attention_decode_place_memory(attention_decode_args & args, float * memory) {
    args.sums   = memory;
    args.totals = memory + size_t(args.n_out_rows()) * args.n_chunks * args.dim;
}

}  // namespace ggml_ext
