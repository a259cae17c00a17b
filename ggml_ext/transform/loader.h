// The reading of one model's transforms: load_v1.cpp and load_v2.cpp read what the two versions of
// the format say of sites into one list, from which load.cpp and load_folds.cpp (what was folded
// into the weights) work; load_heads.cpp has the per-head transforms of a KV cache. Internal to them.

#pragma once

#include "core/ext_op.h"
#include "digest.h"
#include "factors.h"
#include "transform.h"

#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

// The sites of a block in version 1, in the order of the keys that have an element for each.
enum ggml_ext_kind { GGML_EXT_ATTN_IN, GGML_EXT_ATTN_OUT, GGML_EXT_FFN_IN, GGML_EXT_FFN_MID, GGML_EXT_N_KINDS };

// Throws std::runtime_error("ggml-ext: key 'KEY' WHY").
[[noreturn]] void ggml_ext_refuse_key(const char * key, const std::string & why);

class ggml_ext_transform_loader {
  public:
    ggml_ext_transform_loader(llama_model_loader & ml, llama_model & model) : ml(ml), model(model), file(ml) {}

    // Null where file and environment ask for nothing.
    std::shared_ptr<ggml_ext_model> load();

  private:
    void check_keys();

    // An array of each site's. per_block: how many elements version 1 has per block.
    void check_length(const char * key, size_t length, size_t per_block) const;

    // Fill result->places with sites whose folds are not read yet.
    void           place_implied();
    ggml_ext_place implied(uint32_t block, uint32_t kind) const;
    void           place_listed();
    void           check_maker(const ggml_ext_place & place) const;

    void load_site(size_t element);
    void attach(const ggml_ext_place & place, const std::string & cause, const ggml_ext_site * site);
    void load_heads(uint32_t block);
    void load_folds();
    void check_fold(size_t element) const;
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

    const ggml_tensor * weight_in_file(const std::string & name) const { return ml.get_tensor_meta(name.c_str()); }

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

    uint32_t              version = 0;                                   // of the format
    std::string           transform;                                     // its name
    std::vector<uint32_t> hadamards;                                     // per site; empty: all 0
    std::vector<float>    clips;                                         // likewise; empty: all 1

    std::unordered_map<std::string, const ggml_tensor *>       loaded;   // weights that this load made tensors for
    std::map<std::pair<ggml_backend_dev_t, ggml_ext_op>, bool> support;  // see runs()
};
