// GGML_OP_FLASH_ATTN_EXT for up to 8 query tokens over a cache of q8_0 and q4_0, which is read as it is.

#pragma once

struct ggml_backend_cuda_context;
struct ggml_tensor;

// From types, shapes and strides: K and V of q8_0 or q4_0, heads of 64, 96, 128 or 256 channels, tensor cores (sm_75).
bool ggml_ext_cuda_attention_decode_applies(int device, const ggml_tensor * dst);

// Where it applies. Takes (dim + 2) * 4 bytes per row of the result and chunk of the cache from ctx.pool().
void ggml_ext_cuda_attention_decode(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
