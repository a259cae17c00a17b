#include "override.h"

#include "fq4/cpu/buffer.h"
#include "traits.h"

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

// The bytes are the file's, at their addresses: so llama.cpp locks them with --mlock, counts them as host memory, and
// a GPU takes them as it takes a mapped file's.
bool is_host(ggml_backend_buffer_type_t) {
    return true;
}

// The buffer type whose entry in upstream's list lets us in. The loader puts FQ4 weights there. The list is made when
// it is first asked for: a loader opens every variant of the library to ask what it needs, and code that runs on opening
// would run on processors that lack it.
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

}  // namespace

ggml_backend_buffer_type_t ggml_ext_cpu_buffer_type(void) {
    static override_buffer_type     overrides;
    static ggml_backend_buffer_type type = {
        /* .iface   = */ { buffer_type_name, ggml_ext_fq4_buffer_alloc, alignment, nullptr, nullptr, is_host },
        /* .device  = */
        nullptr,
        /* .context = */ &overrides,
    };
    return &type;
}
