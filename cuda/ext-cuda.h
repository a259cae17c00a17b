// Our code inside ggml-cuda: what upstream's file calls (one line each, ggml_ext/patches), and the table of features.

#ifndef GGML_EXT_CUDA_H
#define GGML_EXT_CUDA_H

struct ggml_backend_cuda_context;
struct ggml_cgraph;
struct ggml_tensor;

// --- called by ggml-cuda.cu ---

enum ggml_ext_cuda_answer {
    GGML_EXT_CUDA_NOT_OURS,  // upstream decides
    GGML_EXT_CUDA_NO,
    GGML_EXT_CUDA_YES,
};

// supports_op. An op that computes with FQ4 data and a sub-op of ours are never upstream's.
enum ggml_ext_cuda_answer ggml_ext_cuda_supports(int device, const ggml_tensor * op);

// Whether upstream must leave this product alone: in its fusions of quantised weights, and where it decides whether a
// product with experts waits for the device (ours never does).
bool ggml_ext_cuda_owns(const ggml_tensor * product);

// Before a graph is evaluated or its captured form is launched: what was captured under other settings is void.
void ggml_ext_cuda_check_settings(ggml_backend_cuda_context & ctx);

// Before the nodes of a graph are launched or captured, in this order: what was cached for the last graph is void.
void ggml_ext_cuda_graph_begin(ggml_backend_cuda_context & ctx);

// Computes node i and perhaps some that follow it; returns how many follow, 0 also where nothing was done.
int ggml_ext_cuda_fuse(ggml_backend_cuda_context & ctx, ggml_cgraph * graph, int i);

// Computes dst if it is ours; false: upstream does.
bool ggml_ext_cuda_compute(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// Frees what belongs to the context.
void ggml_ext_cuda_free(ggml_backend_cuda_context & ctx);

// --- features ---

struct ggml_ext_cuda_feature {
    // Whether it computes op on this device: from types, shapes, strides and settings, not from data.
    bool (*applies)(int device, const ggml_tensor * op);
    // Launches on ctx.stream(), without waiting for the device.
    void (*compute)(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
    // As ggml_ext_cuda_fuse; NULL: never.
    int (*fuse)(ggml_backend_cuda_context & ctx, ggml_cgraph * graph, int i);
};

// One per feature, in the feature's own file; ext-cuda.cu holds the table.
extern const ggml_ext_cuda_feature ggml_ext_cuda_scale_add;
extern const ggml_ext_cuda_feature ggml_ext_cuda_act_round;
extern const ggml_ext_cuda_feature ggml_ext_cuda_kron;
extern const ggml_ext_cuda_feature ggml_ext_cuda_fq4_get_rows;
extern const ggml_ext_cuda_feature ggml_ext_cuda_fq4_dequantize;  // CPY, DUP, CONT
extern const ggml_ext_cuda_feature ggml_ext_cuda_fq4_mul_mat;     // MUL_MAT and MUL_MAT_ID
extern const ggml_ext_cuda_feature ggml_ext_cuda_attention;       // FLASH_ATTN_EXT
extern const ggml_ext_cuda_feature ggml_ext_cuda_sample;

#endif  // GGML_EXT_CUDA_H
