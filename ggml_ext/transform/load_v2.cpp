// Version 2 of the format: a table of sites, each with its readers and with what makes its channels.

#include "llama-model.h"
#include "loader.h"
#include "metadata.h"

#include <cstdio>

namespace {

const char * const readers_key = "ggml_ext.site.readers";
const char * const makers_key  = "ggml_ext.site.makers";

}  // namespace

void ggml_ext_transform_loader::place_listed() {
    const std::vector<std::string> readers = ggml_ext_read_strings(ml.metadata, readers_key);
    const std::vector<std::string> makers  = ggml_ext_read_strings(ml.metadata, makers_key);
    const std::vector<uint32_t>    online  = ggml_ext_read_array<uint32_t>(ml.metadata, "ggml_ext.site.online");
    const std::vector<uint32_t>    folded  = ggml_ext_read_array<uint32_t>(ml.metadata, "ggml_ext.site.folded");
    const std::vector<uint32_t>    first   = ggml_ext_read_array<uint32_t>(ml.metadata, "ggml_ext.site.first");
    const std::vector<uint32_t>    rows    = ggml_ext_read_array<uint32_t>(ml.metadata, "ggml_ext.site.rows");
    const std::vector<uint32_t>    head    = ggml_ext_read_array<uint32_t>(ml.metadata, "ggml_ext.site.head");

    // The lengths add up: the metadata has been checked.
    auto next = readers.begin();
    for (size_t i = 0; i < online.size(); i++) {
        const auto     end = next + online[i] + folded[i];
        ggml_ext_place place;
        place.readers.assign(next, end);
        place.n_online = online[i];
        next           = end;
        if (std::sscanf(place.readers[0].c_str(), "blk.%u.", &place.block) != 1 ||
            place.block >= model.hparams.n_layer_all) {
            ggml_ext_refuse_key(readers_key, "names '" + place.readers[0] + "', which is of no block of this model");
        }
        for (const std::string & name : place.readers) {
            const ggml_tensor * weight = weight_in_file(name);
            if (!weight) {
                ggml_ext_refuse_key(readers_key, "names '" + name + "', but the file lacks it");
            }
            place.n = place.n == 0 ? weight->ne[0] : place.n;
            if (weight->ne[0] != place.n) {
                ggml_ext_refuse_key(readers_key,
                                    "names '" + name + "', whose rows have length " + std::to_string(weight->ne[0]) +
                                        ", not " + std::to_string(place.n) + " as those of '" + place.readers[0] + "'");
            }
        }
        place.maker    = makers[i];
        place.first    = first[i];
        place.rows     = rows[i];
        place.head_dim = head[i];
        check_maker(place);
        result->places.push_back(std::move(place));
    }
}

// Whether the rows that make the channels are those of a matrix, and as many as the channels are.
void ggml_ext_transform_loader::check_maker(const ggml_ext_place & place) const {
    const auto refuse = [&](const std::string & why) {
        ggml_ext_refuse_key(makers_key, "speaks of what '" + place.readers[0] + "' reads: " + why);
    };
    if (place.maker.empty()) {
        if (place.first != 0 || place.rows != 0 || place.head_dim != 0) {
            refuse("rows of no matrix");
        }
        return;
    }
    const ggml_tensor * weight = weight_in_file(place.maker);
    if (!weight) {
        refuse("the file lacks '" + place.maker + "'");
    }
    const bool    spans = place.rows > weight->ne[1];  // then its matrices make the channels one after the other
    const int64_t n_row = weight->ne[1] * (spans ? weight->ne[2] : 1);
    if (place.first + place.rows > n_row || (spans && place.first != 0)) {
        refuse("rows " + std::to_string(place.first) + " to " + std::to_string(place.first + place.rows) + " of '" +
               place.maker + "', which has " + std::to_string(n_row));
    }
    if (place.head_dim == 0 ? place.rows != place.n :
                              place.rows < 1 || place.rows % place.head_dim != 0 || place.n % place.rows != 0) {
        refuse(std::to_string(place.rows) + " rows" +
               (place.head_dim == 0 ? "" : " in heads of " + std::to_string(place.head_dim)) + " for " +
               std::to_string(place.n) + " channels");
    }
}
