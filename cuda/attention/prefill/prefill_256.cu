#include "shapes.cuh"

template cudaError_t ggml_ext::attention_launch_prefill<256>(const attention_prefill &, cudaStream_t);
