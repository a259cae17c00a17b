// In the place of cuda/attention_{prefill,decode}_{96,128,256}.cu: the stand-in's tests have heads of 64, and these kernels
// have tests of their own.

#include "attention/decode/args.h"
#include "attention/prefill/shapes.cuh"
#include "common.cuh"

namespace ggml_ext {

template <int DIM>
cudaError_t attention_decode_launch(const attention_decode_args & args, cache_type k, cache_type v,
                                    cudaStream_t stream);

#define GGML_EXT_STAND_IN_HEAD(D)                                                                                 \
    template <> cudaError_t attention_launch_prefill<D>(const attention_prefill &, cudaStream_t) {                \
        GGML_ABORT("the stand-in has no heads of %d", D);                                                         \
    }                                                                                                             \
    template <>                                                                                                   \
    cudaError_t attention_decode_launch<D>(const attention_decode_args &, cache_type, cache_type, cudaStream_t) { \
        GGML_ABORT("the stand-in has no heads of %d", D);                                                         \
    }
GGML_EXT_STAND_IN_HEAD(96)
GGML_EXT_STAND_IN_HEAD(128)
GGML_EXT_STAND_IN_HEAD(256)

}  // namespace ggml_ext
