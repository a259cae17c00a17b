#include "override-cpu.h"

#include "traits.h"
#include "types/fq4-buffer-cpu.h"

namespace {

class override_traits : public ggml::cpu::tensor_traits {
  public:
    explicit override_traits(const ggml_ext_cpu_override & feature) : feature(feature) {}

    bool work_size(int n_threads, const ggml_tensor * op, size_t & size) override {
        size = feature.work_size(op, n_threads);
        return true;
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        feature.compute(params, op);
        return true;
    }

    const ggml_ext_cpu_override & feature;
};

const char * buffer_type_name(ggml_backend_buffer_type_t) {
    return "CPU_FQ4";
}

size_t alignment(ggml_backend_buffer_type_t) {
    return 64;
}

// The buffer type whose entry in upstream's list lets us in. The loader puts FQ4 weights there.
class override_buffer_type : public ggml::cpu::extra_buffer_type {
  public:
    bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) override {
        const ggml_tensor * weights = op->src[0];
        return (op->op == GGML_OP_MUL_MAT || op->op == GGML_OP_MUL_MAT_ID) && weights->buffer != nullptr &&
               weights->buffer->buft->iface.get_name == buffer_type_name && fq4_mul_mat.feature.applies(op);
    }

    ggml::cpu::tensor_traits * get_tensor_traits(const ggml_tensor * op) override {
        switch (op->op) {
            case GGML_OP_MUL_MAT:
            case GGML_OP_MUL_MAT_ID:
                return fq4_mul_mat.feature.applies(op) ? &fq4_mul_mat : nullptr;
            case GGML_OP_FLASH_ATTN_EXT:
                return attention.feature.applies(op) ? &attention : nullptr;
            default:
                return nullptr;
        }
    }

  private:
    override_traits fq4_mul_mat{ ggml_ext_cpu_fq4_mul_mat };
    override_traits attention{ ggml_ext_cpu_attention };
};

override_buffer_type overrides;

ggml_backend_buffer_type buffer_type = {
    /* .iface   = */ { buffer_type_name, ggml_ext_fq4_buffer_alloc, alignment, nullptr, nullptr, nullptr },
    /* .device  = */
    nullptr,
    /* .context = */ &overrides,
};

// After upstream's own entries, so that weights in a repacked buffer stay with the buffer's own code.
const bool registered = [] {
    ggml_backend_cpu_get_extra_buffer_types().push_back(&buffer_type);
    return true;
}();

}  // namespace
