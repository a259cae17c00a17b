#include "launch.cuh"

template cudaError_t ggml_ext::attention_decode_launch<256>(const attention_decode_args &, cache_type, cache_type,
                                                            cudaStream_t);
