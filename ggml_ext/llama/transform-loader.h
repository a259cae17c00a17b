// The reading of one model's transforms, in three files: transform-load.cpp has keys and sites,
// transform-load-heads.cpp the per-head transforms of a KV cache, transform-load-folds.cpp the record of what
// was folded into the weights. Internal to them.

#pragma once

#include "digest.h"
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

// Throws std::runtime_error("ggml-ext: key 'KEY' WHY").
[[noreturn]] void ggml_ext_refuse_key(const char * key, const std::string & why);

class ggml_ext_transform_loader {
  public:
    ggml_ext_transform_loader(llama_model_loader & ml, llama_model & model) : ml(ml), model(model), file(ml) {}

    // Null where file and environment ask for nothing.
    std::shared_ptr<ggml_ext_model> load();

  private:
    void                                 check_keys();
    // The sites of a kind that the block has: one, unless it is of a layout that docs/gguf.md does not know.
    std::vector<const ggml_ext_layout *> sites_of(uint32_t block, uint32_t kind) const;

    // The channels of the block's only site of that kind, 0 where there is not exactly one.
    int64_t channels(uint32_t block, uint32_t kind) const;

    void load_sites(uint32_t block);
    void load_site(uint32_t block, const ggml_ext_layout & row);
    void attach(uint32_t block, const ggml_ext_layout & row, const std::string & cause, const ggml_ext_site * site);
    void load_heads(uint32_t block);
    void load_folds();
    void load_fold(uint32_t block, ggml_ext_fold & fold) const;
    void check_marked() const;
    void round_inputs();
    void log() const;

    // The factor of that name, which the digest then knows.
    ggml_ext_factor take(const std::string & name);

    // The digest of everything that decides what a cache of this model holds.
    uint64_t digest_all();

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
    ggml_ext_digest                 digest;  // of the factors read so far
    ggml_ext_factor_buffers         uploads;
    std::shared_ptr<ggml_ext_model> result = std::make_shared<ggml_ext_model>();

    std::string           transform;                                     // its name
    std::vector<uint32_t> hadamards;                                     // per block and kind of site; empty: all 0
    std::vector<float>    clips;                                         // likewise; empty: all 1

    std::unordered_map<std::string, const ggml_tensor *>       loaded;   // weights that this load made tensors for
    std::map<std::pair<ggml_backend_dev_t, ggml_ext_op>, bool> support;  // see runs()
};
