#include "attention/attention.h"
#include "common.cuh"
#include "common/architecture.h"
#include "launch.cuh"
#include "op.h"

extern template cudaError_t ggml_ext::attention_launch_prefill<64>(const attention_prefill &, cudaStream_t);
extern template cudaError_t ggml_ext::attention_launch_prefill<96>(const attention_prefill &, cudaStream_t);
extern template cudaError_t ggml_ext::attention_launch_prefill<128>(const attention_prefill &, cudaStream_t);
extern template cudaError_t ggml_ext::attention_launch_prefill<256>(const attention_prefill &, cudaStream_t);

const char * ggml_ext_cuda_attention_prefill_refusal(int device, const ggml_tensor * dst) {
    const struct ggml_ext_attention_setting setting = ggml_ext_attention_setting();
    const char *                            reason  = ggml_ext::attention_prefill_refusal(dst, setting);
    if (reason) {
        return reason;
    }
    const ggml_ext::attention_prefill p      = ggml_ext::attention_prefill_of(dst, setting);
    const int                         groups = p.k.type == ggml_ext::ATTENTION_F16 ? 1 : p.d / 32;
    if (!ggml_ext_cuda_has_tensor_cores(device)) {
        return "no 8-bit tensor cores";
    }
    if (ggml_ext::attention_shared_bytes(p.d, groups, p.full) > ggml_cuda_info().devices[device].smpbo) {
        return "the shared memory of this device";
    }
    return nullptr;
}

bool ggml_ext_cuda_attention_prefill_applies(int device, const ggml_tensor * dst) {
    const ggml_tensor * q    = dst->src[0];
    const ggml_tensor * k    = dst->src[1];
    const bool          f16  = !ggml_is_quantized(k->type) || !ggml_is_quantized(dst->src[2]->type);
    const int64_t       rows = q->ne[1] * (q->ne[2] / k->ne[2]);
    return k->ne[1] >= ggml_ext::attention_min_kv &&
           rows >= (f16 ? ggml_ext::attention_min_rows_f16 : ggml_ext::attention_min_rows) && ggml_nelements(dst) > 0 &&
           ggml_ext_cuda_attention_prefill_refusal(device, dst) == nullptr;
}

static cudaError_t launch_prefill(const ggml_ext::attention_prefill & p, cudaStream_t stream) {
    switch (p.d) {
        case 64:
            return ggml_ext::attention_launch_prefill<64>(p, stream);
        case 96:
            return ggml_ext::attention_launch_prefill<96>(p, stream);
        case 128:
            return ggml_ext::attention_launch_prefill<128>(p, stream);
        default:
            return ggml_ext::attention_launch_prefill<256>(p, stream);
    }
}

void ggml_ext_cuda_attention_prefill(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    ggml_ext::attention_prefill p = ggml_ext::attention_prefill_of(dst, ggml_ext_attention_setting());

    const int groups = p.k.type == ggml_ext::ATTENTION_F16 ? 1 : p.d / 32;
    const int slots = ggml_cuda_info().devices[ctx.device].nsm * ggml_ext::attention_blocks_per_sm(p.d, groups, p.full);
    ggml_ext::attention_plan(p, slots);
    ggml_cuda_pool_alloc<char> workspace(ctx.pool(), ggml_ext::attention_place(p, nullptr));
    ggml_ext::attention_place(p, workspace.get());
    CUDA_CHECK(ggml_ext::attention_launch(p, ctx.stream(), launch_prefill));
}
