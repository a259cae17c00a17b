// Reading the record of what a transform folded into the weights, and the digest of a model's transforms.

#include "llama-model.h"
#include "loader.h"
#include "metadata.h"

#include <algorithm>
#include <cstring>

namespace {

const char * const sizes_key     = "ggml_ext.fold.sizes";
const char * const diagonals_key = "ggml_ext.fold.diagonals";
const char * const orders_key    = "ggml_ext.fold.orders";

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
    result->complete                   = version > 1;
    result->recorded                   = result->complete || gguf_find_key(ml.metadata, sizes_key) >= 0;
    const std::vector<uint32_t> sizes  = ggml_ext_read_array<uint32_t>(ml.metadata, sizes_key);
    const std::vector<uint32_t> orders = ggml_ext_read_array<uint32_t>(ml.metadata, orders_key);
    const std::vector<float>    values = ggml_ext_read_array<float>(ml.metadata, diagonals_key);
    const std::vector<float>    heads  = ggml_ext_read_array<float>(ml.metadata, "ggml_ext.fold.heads");
    check_length(sizes_key, sizes.size(), GGML_EXT_N_KINDS);
    check_length(orders_key, orders.size(), 1);
    // The lengths add up: the metadata has been checked.
    auto value = values.begin();
    auto head  = heads.begin();
    for (size_t element = 0; element < result->places.size(); element++) {
        ggml_ext_place & place = result->places[element];
        if (!sizes.empty()) {
            place.diagonal.assign(value, value + sizes[element]);
            value += sizes[element];
        }
        // Version 1 has one matrix per block, at the second of its sites.
        if (!orders.empty() && (version > 1 || element % GGML_EXT_N_KINDS == GGML_EXT_ATTN_OUT)) {
            place.order = orders[version > 1 ? element : element / GGML_EXT_N_KINDS];
            place.head.assign(head, head + place.order * place.order);
            head += place.order * place.order;
        }
        check_fold(element);
    }
}

// Whether the model has what the record speaks of.
void ggml_ext_transform_loader::check_fold(size_t element) const {
    const ggml_ext_place & place  = result->places[element];
    const auto             refuse = [&](const char * key, const std::string & why) {
        ggml_ext_refuse_key(
            key, "speaks of " +
                     (version == 1 ? "block " + std::to_string(place.block) : "what '" + place.readers[0] + "' reads") +
                     ": " + why);
    };
    const int64_t size = int64_t(place.diagonal.size());
    if (size != 0 && size != place.n) {
        refuse(sizes_key, "a diagonal of " + std::to_string(size) + " channels for " +
                              (place.n == 0 ? "no such site" : "a site of " + std::to_string(place.n)));
    }
    const bool of_values = version == 1 && element % GGML_EXT_N_KINDS == GGML_EXT_ATTN_OUT;
    if (place.head_dim == 0 && (!place.head.empty() || (of_values && size != 0))) {
        refuse(place.head.empty() ? sizes_key : orders_key,
               "its attention has no values per head that could take a fold");
    }
    if (!place.head.empty() && place.order != place.head_dim) {
        refuse(orders_key,
               "a matrix of order " + std::to_string(place.order) + " for heads of " + std::to_string(place.head_dim));
    }
    std::vector<float> made(size == 0 ? 0 : place.rows, 0.0f);  // by row; 0: not seen yet, which no element is
    for (int64_t i = 0; place.head_dim != 0 && i < size; i++) {
        float & its = made[place.row_of(i)];
        if (its != 0.0f && its != place.diagonal[i]) {
            refuse(diagonals_key, "a diagonal that differs between query heads of one value head");
        }
        its = place.diagonal[i];
    }
}

uint64_t ggml_ext_transform_loader::digest_all() {
    digest.add(transform);
    digest.add(hadamards);
    digest.add(clips);
    digest.add(result->activation.name());
    for (size_t element = 0; result->recorded && element < result->places.size(); element++) {
        digest.add(result->places[element].diagonal);
        if (version > 1) {
            digest.add(result->places[element].head);
        } else if (element % GGML_EXT_N_KINDS ==
                   GGML_EXT_FFN_MID) {  // version 1: a block's matrix behind its diagonals
            digest.add(result->places[element - GGML_EXT_FFN_MID + GGML_EXT_ATTN_OUT].head);
        }
    }
    // Without a record, files are told apart by all that their keys say, and by the table where there is one.
    const char * const keys = result->recorded ? "ggml_ext.site." : "ggml_ext.";
    for (int64_t id = 0; id < gguf_get_n_kv(ml.metadata); id++) {
        if (std::strncmp(gguf_get_key(ml.metadata, id), keys, std::strlen(keys)) == 0) {
            add_value(digest, ml.metadata, id);
        }
    }
    return digest.value();
}
