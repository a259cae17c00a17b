#include "shapes.cuh"

template cudaError_t ggml_ext::attention_launch_prefill<96>(const attention_prefill &, cudaStream_t);
