// Square factors in a GGUF file: found by name, read, checked, and put on a device.

#pragma once

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "llama-model-loader.h"

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

// A factor as read: order x order floats in C order. order is 0 where the file has no such tensor.
struct ggml_ext_factor {
    std::string        name;
    int64_t            order = 0;
    std::vector<float> data;

    explicit operator bool() const { return order > 0; }
};

// Throws std::runtime_error("ggml-ext: tensor 'NAME' WHY").
[[noreturn]] void ggml_ext_refuse_tensor(const std::string & name, const std::string & why);

// The transform tensors of a file that have not been read yet.
class ggml_ext_factor_file {
  public:
    explicit ggml_ext_factor_file(llama_model_loader & ml);

    bool                empty() const { return names.empty(); }
    const std::string & first() const { return *names.begin(); }

    // Reads a factor and counts it as consumed. Throws std::runtime_error, which names the tensor, unless
    // it is a finite square matrix of type F32 or F16.
    ggml_ext_factor take(const std::string & name);

  private:
    llama_model_loader &  ml;
    std::set<std::string> names;
};

// Device tensors made from factors, F32, in the buffer type that each was asked for.
class ggml_ext_factor_buffers {
  public:
    // A tensor [order, order] whose data arrives with upload(); null for an absent factor.
    ggml_tensor * add(const ggml_ext_factor & factor, ggml_backend_buffer_type_t type);

    // Allocates, copies and hands over what owns the tensors. no_alloc: the model is loaded without its data,
    // so the tensors get buffers without memory. Throws std::runtime_error when memory is short.
    void upload(bool no_alloc, std::vector<ggml_context_ptr> & contexts,
                std::vector<ggml_backend_buffer_ptr> & buffers);

  private:
    std::map<ggml_backend_buffer_type_t, std::vector<std::pair<ggml_context_ptr, std::vector<float>>>> pending;
};
