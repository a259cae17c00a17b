// Reading the record of what a transform folded into the weights, and the digest of a model's transforms.

#include "llama-model.h"
#include "metadata.h"
#include "transform-loader.h"

#include <algorithm>
#include <cstring>

namespace {

const char * const sizes_key     = "ggml_ext.fold.sizes";
const char * const diagonals_key = "ggml_ext.fold.diagonals";
const char * const orders_key    = "ggml_ext.fold.orders";

void check_length(const char * key, size_t length, size_t expected, const char * per_block, uint32_t n_block) {
    if (length != expected) {
        ggml_ext_refuse_key(key, "has " + std::to_string(length) + " elements, not " + per_block + " for each of the " +
                                     std::to_string(n_block) + " blocks");
    }
}

// Adds a key's value, whatever its type.
void add_value(ggml_ext_digest & digest, const gguf_context * metadata, int64_t id) {
    const gguf_type type = gguf_get_kv_type(metadata, id);
    if (type == GGUF_TYPE_STRING) {
        digest.add(std::string(gguf_get_val_str(metadata, id)));
    } else if (type != GGUF_TYPE_ARRAY) {
        digest.add(uint64_t(gguf_get_val_u32(metadata, id)));  // the only scalar type of our keys
    } else if (gguf_get_arr_type(metadata, id) == GGUF_TYPE_STRING) {
        for (size_t i = 0; i < gguf_get_arr_n(metadata, id); i++) {
            digest.add(std::string(gguf_get_arr_str(metadata, id, i)));
        }
    } else {
        digest.add(gguf_get_arr_data(metadata, id), gguf_get_arr_n(metadata, id) * sizeof(uint32_t));  // or float
    }
}

}  // namespace

void ggml_ext_transform_loader::load_folds() {
    if (gguf_find_key(ml.metadata, sizes_key) < 0) {
        return;
    }
    const std::vector<uint32_t> sizes   = ggml_ext_read_array<uint32_t>(ml.metadata, sizes_key);
    const std::vector<uint32_t> orders  = ggml_ext_read_array<uint32_t>(ml.metadata, orders_key);
    const std::vector<float>    values  = ggml_ext_read_array<float>(ml.metadata, diagonals_key);
    const std::vector<float>    heads   = ggml_ext_read_array<float>(ml.metadata, "ggml_ext.fold.heads");
    const uint32_t              n_block = model.hparams.n_layer_all;
    check_length(sizes_key, sizes.size(), size_t(GGML_EXT_N_KINDS) * n_block, "four", n_block);
    if (!orders.empty()) {
        check_length(orders_key, orders.size(), n_block, "one", n_block);
    }
    // The lengths add up: the metadata has been checked.
    auto value = values.begin();
    auto head  = heads.begin();
    for (uint32_t block = 0; block < n_block; block++) {
        ggml_ext_fold fold;
        for (uint32_t kind = 0; kind < GGML_EXT_N_KINDS; kind++) {
            const uint32_t size = sizes[size_t(block) * GGML_EXT_N_KINDS + kind];
            fold.diagonals[kind].assign(value, value + size);
            value += size;
        }
        if (!orders.empty()) {
            fold.order                = orders[block];
            const int64_t n_of_matrix = fold.order * fold.order;
            fold.head.assign(head, head + n_of_matrix);
            head += n_of_matrix;
        }
        load_fold(block, fold);
        result->folds.push_back(std::move(fold));
    }
}

// Whether the block has what the record speaks of.
void ggml_ext_transform_loader::load_fold(uint32_t block, ggml_ext_fold & fold) const {
    const llama_hparams & hparams = model.hparams;
    const auto            refuse  = [block](const char * key, const std::string & why) {
        ggml_ext_refuse_key(key, "speaks of block " + std::to_string(block) + ": " + why);
    };
    for (uint32_t kind = 0; kind < GGML_EXT_N_KINDS; kind++) {
        const int64_t size = int64_t(fold.diagonals[kind].size());
        const int64_t n    = channels(block, kind);
        if (size != 0 && size != n) {
            refuse(sizes_key, "a diagonal of " + std::to_string(size) + " channels for " +
                                  (n == 0 ? "no such site" : "a site of " + std::to_string(n)));
        }
    }
    const std::vector<float> & shared = fold.diagonals[GGML_EXT_ATTN_OUT];
    if (shared.empty() && fold.head.empty()) {
        return;
    }
    const int64_t dim    = hparams.n_embd_head_v(block);
    const int64_t n_head = hparams.n_head(block);
    const int64_t n_kv   = hparams.n_head_kv(block);
    const bool    has_v  = weight_in_file(block, "attn_v") || weight_in_file(block, "attn_qkv");
    if (!has_v || hparams.is_mla() || n_kv < 1 || n_head % n_kv != 0 ||
        channels(block, GGML_EXT_ATTN_OUT) != n_head * dim) {
        refuse(shared.empty() ? orders_key : sizes_key, "its attention has no values per head that could take a fold");
    }
    if (!fold.head.empty() && fold.order != dim) {
        refuse(orders_key, "a matrix of order " + std::to_string(fold.order) + " for heads of " + std::to_string(dim));
    }
    for (int64_t i = 0; i < int64_t(shared.size()); i++) {
        const int64_t group = n_head / n_kv * dim;
        if (shared[i] != shared[i / group * group + i % dim]) {
            refuse(diagonals_key, "a diagonal of attn_out that differs between query heads of one value head");
        }
    }
}

uint64_t ggml_ext_transform_loader::digest_all() {
    digest.add(transform);
    digest.add(hadamards);
    digest.add(clips);
    digest.add(result->activation.name());
    for (const ggml_ext_fold & fold : result->folds) {
        for (const std::vector<float> & diagonal : fold.diagonals) {
            digest.add(diagonal);
        }
        digest.add(fold.head);
    }
    // Without a record, files are told apart by all that their keys say.
    for (int64_t id = 0; result->folds.empty() && id < gguf_get_n_kv(ml.metadata); id++) {
        if (std::strncmp(gguf_get_key(ml.metadata, id), "ggml_ext.", 9) == 0) {
            add_value(digest, ml.metadata, id);
        }
    }
    return digest.value();
}
