#include "activation.cuh"
#include "common.cuh"
#include "common/context.h"
#include "quantize.cuh"

// Also called while a CUDA graph is captured: upstream captures in relaxed mode, where cudaMalloc is allowed and takes
// place at once, outside the graph.
static void * allocate(size_t size) {
    void * memory = nullptr;
    CUDA_CHECK(cudaMalloc(&memory, size));
    return memory;
}

struct activation_slot {
    ggml_ext_cuda_activation activation;
    bool                     filled;
};

static activation_slot find_slot(ggml_backend_cuda_context & ctx, const ggml_tensor * x, int group) {
    GGML_ASSERT(x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float) && x->ne[0] % group == 0);
    const int64_t k      = x->ne[0];
    const int64_t n_rows = ggml_nrows(x);
    GGML_ASSERT(n_rows * (k / group) < INT32_MAX);
    const size_t codes_size  = GGML_PAD(k * n_rows, 256);
    const size_t scales_size = k / group * n_rows * sizeof(float);

    ggml_ext_activation_slots & slots  = ggml_ext_cuda_state_of(ctx).streams[ctx.curr_stream_no];
    const auto                  found  = slots.find(x, group, std::max<size_t>(codes_size + scales_size, 1), allocate);
    char *                      buffer = static_cast<char *>(found.buffer);
    return {
        { reinterpret_cast<int8_t *>(buffer), reinterpret_cast<float *>(buffer + codes_size), k, n_rows },
        found.filled
    };
}

ggml_ext_cuda_activation ggml_ext_cuda_quantized(ggml_backend_cuda_context & ctx, const ggml_tensor * x, int group) {
    const activation_slot slot = find_slot(ctx, x, group);
    if (slot.filled || ggml_is_empty(x)) {
        return slot.activation;
    }
    GGML_ASSERT(ggml_ext_cuda_state_of(ctx).unwritten.count(x) == 0 &&
                "ggml-ext: an activation that exists in int8 only is gone");
    const ggml_ext_activation_shape shape = {
        x->ne[0],          ggml_nrows(x),     uint32_t(x->ne[1]), uint32_t(x->ne[2]),
        int64_t(x->nb[1]), int64_t(x->nb[2]), int64_t(x->nb[3]),
    };
    const auto plan   = ggml_ext_activation_plan(shape, group, x->data);
    const auto kernel = ggml_ext_activation_kernel_of(group, plan.aligned);
    CUDA_CHECK(ggml_ext_cuda_launch_overlapped(kernel, dim3(plan.n_blocks), dim3(GGML_EXT_ACTIVATION_THREADS), 0,
                                               ctx.stream(), (const char *) x->data, slot.activation.codes,
                                               slot.activation.scales, shape));
    return slot.activation;
}

ggml_ext_cuda_activation ggml_ext_cuda_quantized_reserve(ggml_backend_cuda_context & ctx, const ggml_tensor * x,
                                                         bool codes_only) {
    if (codes_only) {
        ggml_ext_cuda_state_of(ctx).unwritten.insert(x);
    }
    return find_slot(ctx, x, GGML_EXT_ACTIVATION_GROUP).activation;
}
