// The feature "attention": which kernel takes a GGML_OP_FLASH_ATTN_EXT, if one of ours does.

#include "attention.h"
#include "attention/decode/decode.h"
#include "attention/setting.h"
#include "common.cuh"
#include "ext-cuda.h"

#include <atomic>

struct attention_kernel {
    bool (*applies)(int device, const ggml_tensor * dst);
    void (*compute)(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
};

// The first that applies.
static const attention_kernel kernels[] = {
    { ggml_ext_cuda_attention_decode_applies,  ggml_ext_cuda_attention_decode  },
    { ggml_ext_cuda_attention_prefill_applies, ggml_ext_cuda_attention_prefill },
};

static const attention_kernel * find(int device, const ggml_tensor * dst) {
    for (const attention_kernel & k : kernels) {
        if (k.applies(device, dst)) {
            return &k;
        }
    }
    return nullptr;
}

// Once for the process: attention over a quantised cache that no kernel of ours could take.
static void tell_refusal(int device, const ggml_tensor * dst) {
    static std::atomic<bool> told(false);
    const ggml_tensor *      k      = dst->src[1];
    const ggml_tensor *      v      = dst->src[2];
    const char *             reason = ggml_ext_cuda_attention_prefill_refusal(device, dst);
    if (reason && (ggml_is_quantized(k->type) || ggml_is_quantized(v->type)) && !told.exchange(true)) {
        GGML_LOG_WARN("ggml-ext: CUDA attention over K %s [%d] and V %s [%d] is left to llama.cpp's own code: %s\n",
                      ggml_type_name(k->type), (int) k->ne[0], ggml_type_name(v->type), (int) v->ne[0], reason);
    }
}

static void tell_use(const ggml_tensor * dst) {
    static std::atomic<bool> told(false);
    if (!told.exchange(true)) {
        GGML_LOG_INFO(
            "ggml-ext: CUDA attention over K %s and V %s in 8-bit integers (setting: %s weights); GGML_EXT_ATTN=off "
            "switches it off\n",
            ggml_type_name(dst->src[1]->type), ggml_type_name(dst->src[2]->type),
            ggml_ext_attention_setting().mode == GGML_EXT_ATTENTION_FULL ? "8-bit" : "f16");
    }
}

// `fast` is the default: only what was measured to be faster, which these kernels are not yet.
static bool is_chosen() {
    const struct ggml_ext_attention_setting setting = ggml_ext_attention_setting();
    return setting.mode != GGML_EXT_ATTENTION_OFF && !setting.fast;
}

static bool applies(int device, const ggml_tensor * op) {
    if (op->op != GGML_OP_FLASH_ATTN_EXT || !is_chosen()) {
        return false;
    }
    if (find(device, op)) {
        return true;
    }
    tell_refusal(device, op);
    return false;
}

static void compute(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    tell_use(dst);
    find(ctx.device, dst)->compute(ctx, dst);
}

const ggml_ext_cuda_feature ggml_ext_cuda_attention = { applies, compute, nullptr };
