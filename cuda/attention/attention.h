// Kernels for GGML_OP_FLASH_ATTN_EXT, host side.

#ifndef GGML_EXT_CUDA_ATTENTION_H
#define GGML_EXT_CUDA_ATTENTION_H

struct ggml_backend_cuda_context;
struct ggml_tensor;

// Many query tokens. NULL, or why the op cannot be taken on this device at all.
const char * ggml_ext_cuda_attention_prefill_refusal(int device, const ggml_tensor * dst);
// Whether it is taken, which also asks for enough queries and kv tokens.
bool         ggml_ext_cuda_attention_prefill_applies(int device, const ggml_tensor * dst);
void         ggml_ext_cuda_attention_prefill(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

#endif  // GGML_EXT_CUDA_ATTENTION_H
