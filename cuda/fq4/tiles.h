// Products of FQ4 or FQ4_64 weights with many columns of activations: MUL_MAT and MUL_MAT_ID.

#pragma once

struct ggml_backend_cuda_context;
struct ggml_tensor;

// Whether ggml_ext_cuda_fq4_tiles computes dst on this device: dst and src[1] F32 with adjacent elements, src[0] FQ4 or FQ4_64, any
// other strides, batches that src[0] is repeated over; sm_61 and newer; nothing empty.
bool ggml_ext_cuda_fq4_tiles_applies(int device, const ggml_tensor * dst);

// On ctx.stream(), with scratch memory of ctx.pool(): may be captured into a CUDA graph. The same bits on every run.
void ggml_ext_cuda_fq4_tiles(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
