// The reading of one model's transforms, in two files: transform-load.cpp has keys and sites,
// transform-load-heads.cpp the per-head transforms of a KV cache. Internal to them.

#pragma once

#include "factors.h"
#include "ops/ext-op.h"
#include "transform.h"

#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

struct ggml_ext_layout;

class ggml_ext_transform_loader {
  public:
    ggml_ext_transform_loader(llama_model_loader & ml, llama_model & model) : ml(ml), model(model), file(ml) {}

    // Null where file and environment ask for nothing.
    std::shared_ptr<ggml_ext_model> load();

  private:
    void check_keys();
    void load_sites(uint32_t block);
    void load_site(uint32_t block, const ggml_ext_layout & row);
    void attach(uint32_t block, const ggml_ext_layout & row, const std::string & cause, const ggml_ext_site * site);
    void load_heads(uint32_t block);
    void check_marked() const;
    void round_inputs();
    void log() const;

    std::pair<ggml_tensor *, ggml_tensor *> load_pair(uint32_t block, const char * a, const char * b, int64_t order,
                                                      bool transposed);

    std::string tensor_name(uint32_t block, const char * matrix, const char * suffix) const {
        return "blk." + std::to_string(block) + "." + matrix + "." + suffix;
    }

    const ggml_tensor * weight_in_file(uint32_t block, const char * matrix) const {
        return ml.get_tensor_meta(tensor_name(block, matrix, "weight").c_str());
    }

    // Whether the block's device runs a sub-op; one that does not is named in the log, once.
    bool runs(uint32_t block, ggml_ext_op op);

    // Where the block's factors go: to its device if that runs the transform, else to the CPU.
    ggml_backend_buffer_type_t buffer_type(uint32_t block);

    llama_model_loader &            ml;
    llama_model &                   model;
    ggml_ext_factor_file            file;
    const bool                      has_factors = !file.empty();
    ggml_ext_factor_buffers         uploads;
    std::shared_ptr<ggml_ext_model> result = std::make_shared<ggml_ext_model>();

    std::string           transform;                                     // its name
    std::vector<uint32_t> hadamards;                                     // per block and kind of site; empty: all 0
    std::vector<float>    clips;                                         // likewise; empty: all 1

    std::unordered_map<std::string, const ggml_tensor *>       loaded;   // weights that this load made tensors for
    std::map<std::pair<ggml_backend_dev_t, ggml_ext_op>, bool> support;  // see runs()
};
