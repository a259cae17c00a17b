#include "args.h"
#include "common.cuh"
#include "common/architecture.h"
#include "decode.h"
#include "merge.cuh"

namespace ggml_ext {

// attention_decode_<DIM>.cu
template <int DIM>
cudaError_t attention_decode_launch(const attention_decode_args & args, cache_type k, cache_type v,
                                    cudaStream_t stream);

}  // namespace ggml_ext

using namespace ggml_ext;

bool ggml_ext_cuda_attention_decode_applies(int device, const ggml_tensor * dst) {
    return dst->op == GGML_OP_FLASH_ATTN_EXT && ggml_ext_cuda_has_tensor_cores(device) &&
           attention_decode_takes(dst, ggml_cuda_info().devices[device].smpbo);
}

void ggml_ext_cuda_attention_decode(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    if (ggml_nelements(dst) == 0) {
        return;
    }
    const auto &                info = ggml_cuda_info().devices[ctx.device];
    attention_decode_args       args = attention_decode_make_args(dst, info.nsm, info.smpbo);
    ggml_cuda_pool_alloc<float> memory(ctx.pool(), attention_decode_memory(args));
    attention_decode_place_memory(args, memory.get());

    const cache_type k = cache_type_of(dst->src[1]), v = cache_type_of(dst->src[2]);
    const auto       launch = args.dim == 64  ? attention_decode_launch<64> :
                              args.dim == 96  ? attention_decode_launch<96> :
                              args.dim == 128 ? attention_decode_launch<128> :
                                                attention_decode_launch<256>;
    CUDA_CHECK(launch(args, k, v, ctx.stream()));
    CUDA_CHECK(ggml_ext_cuda_launch(ggml_ext_attention_decode_merge_kernel, dim3(unsigned(args.n_out_rows())),
                                    dim3(decode_merge_threads), 0, ctx.stream(), args));
}
