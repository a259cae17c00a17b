#include "metadata.h"

#include "ggml-ext.h"
#include "gguf.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

struct known_key {
    const char * name;
    gguf_type    type;
    gguf_type    element = GGUF_TYPE_COUNT;  // of an array
};

constexpr char prefix[] = "ggml_ext.";

constexpr known_key known_keys[] = {
    { "ggml_ext.version", GGUF_TYPE_UINT32 },
    { "ggml_ext.rounding", GGUF_TYPE_STRING },
    { "ggml_ext.transform.name", GGUF_TYPE_STRING },
    { "ggml_ext.site.readers", GGUF_TYPE_ARRAY, GGUF_TYPE_STRING },
    { "ggml_ext.site.online", GGUF_TYPE_ARRAY, GGUF_TYPE_UINT32 },
    { "ggml_ext.site.folded", GGUF_TYPE_ARRAY, GGUF_TYPE_UINT32 },
    { "ggml_ext.site.makers", GGUF_TYPE_ARRAY, GGUF_TYPE_STRING },
    { "ggml_ext.site.first", GGUF_TYPE_ARRAY, GGUF_TYPE_UINT32 },
    { "ggml_ext.site.rows", GGUF_TYPE_ARRAY, GGUF_TYPE_UINT32 },
    { "ggml_ext.site.head", GGUF_TYPE_ARRAY, GGUF_TYPE_UINT32 },
    { "ggml_ext.transform.hadamard", GGUF_TYPE_ARRAY, GGUF_TYPE_UINT32 },
    { "ggml_ext.transform.clip", GGUF_TYPE_ARRAY, GGUF_TYPE_FLOAT32 },
    { "ggml_ext.fold.sizes", GGUF_TYPE_ARRAY, GGUF_TYPE_UINT32 },
    { "ggml_ext.fold.diagonals", GGUF_TYPE_ARRAY, GGUF_TYPE_FLOAT32 },
    { "ggml_ext.fold.orders", GGUF_TYPE_ARRAY, GGUF_TYPE_UINT32 },
    { "ggml_ext.fold.heads", GGUF_TYPE_ARRAY, GGUF_TYPE_FLOAT32 },
    { "ggml_ext.activation.bits", GGUF_TYPE_UINT32 },
    { "ggml_ext.activation.group", GGUF_TYPE_UINT32 },
    { "ggml_ext.calibration.hash", GGUF_TYPE_STRING },
    { "ggml_ext.calibration.samples", GGUF_TYPE_UINT32 },
    { "ggml_ext.calibration.length", GGUF_TYPE_UINT32 },
    { "ggml_ext.calibration.seed", GGUF_TYPE_UINT32 },
    { "ggml_ext.error.tensors", GGUF_TYPE_ARRAY, GGUF_TYPE_STRING },
    { "ggml_ext.error.values", GGUF_TYPE_ARRAY, GGUF_TYPE_FLOAT32 },
    { "ggml_ext.error.kind", GGUF_TYPE_STRING },
    { "ggml_ext.loss.tensors", GGUF_TYPE_ARRAY, GGUF_TYPE_STRING },
    { "ggml_ext.loss.types", GGUF_TYPE_ARRAY, GGUF_TYPE_STRING },
    { "ggml_ext.loss.values", GGUF_TYPE_ARRAY, GGUF_TYPE_FLOAT32 },
};

constexpr const char * transform_names[] = { "none", "smoothquant", "awq", "folded", "hadamard", "flatquant" };

[[noreturn]] void refuse(const std::string & key, const std::string & why) {
    throw std::runtime_error("ggml-ext: key '" + key + "' " + why);
}

std::string type_name(gguf_type type, gguf_type element) {
    return type == GGUF_TYPE_ARRAY ? std::string("array of ") + gguf_type_name(element) : gguf_type_name(type);
}

void check_known(const gguf_context * metadata, int64_t id) {
    const char * key = gguf_get_key(metadata, id);
    for (const known_key & known : known_keys) {
        if (std::strcmp(key, known.name) == 0) {
            const gguf_type type    = gguf_get_kv_type(metadata, id);
            const gguf_type element = type == GGUF_TYPE_ARRAY ? gguf_get_arr_type(metadata, id) : GGUF_TYPE_COUNT;
            if (type != known.type || element != known.element) {
                refuse(key,
                       "must be of type " + type_name(known.type, known.element) + ", is " + type_name(type, element));
            }
            return;
        }
    }
    refuse(key, "is not known to this build; a newer ggml-ext may read the file");
}

void check_version(const gguf_context * metadata) {
    const int64_t id = gguf_find_key(metadata, "ggml_ext.version");
    if (id < 0) {
        refuse("ggml_ext.version", "is missing although the file has other keys under 'ggml_ext.'");
    }
    const uint32_t version = gguf_get_val_u32(metadata, id);
    if (version < 1 || version > GGML_EXT_FORMAT_VERSION) {
        refuse("ggml_ext.version", "is " + std::to_string(version) + ", this build reads 1 to " +
                                       std::to_string(GGML_EXT_FORMAT_VERSION) +
                                       "; a newer ggml-ext may read the file");
    }
}

// The table of sites: version 2 has it, whole.
void check_sites(const gguf_context * metadata) {
    const char * const keys[] = { "ggml_ext.site.readers", "ggml_ext.site.online", "ggml_ext.site.folded",
                                  "ggml_ext.site.makers",  "ggml_ext.site.first",  "ggml_ext.site.rows",
                                  "ggml_ext.site.head" };
    const int64_t      online = gguf_find_key(metadata, "ggml_ext.site.online");
    for (const char * key : keys) {
        const int64_t id = gguf_find_key(metadata, key);
        if (ggml_ext_format_version(metadata) == 1) {
            if (id >= 0) {
                refuse(key, "is one of version 2, but key 'ggml_ext.version' is 1");
            }
            continue;
        }
        if (id < 0) {
            refuse(key, "is missing, but key 'ggml_ext.version' is 2");
        }
        if (key != keys[0] && gguf_get_arr_n(metadata, id) != gguf_get_arr_n(metadata, online)) {
            refuse(key, "has " + std::to_string(gguf_get_arr_n(metadata, id)) + " elements, '" + keys[1] + "' has " +
                            std::to_string(gguf_get_arr_n(metadata, online)));
        }
    }
    const auto counts  = ggml_ext_read_array<uint32_t>(metadata, keys[1]);
    const auto others  = ggml_ext_read_array<uint32_t>(metadata, keys[2]);
    auto       readers = ggml_ext_read_strings(metadata, keys[0]);
    uint64_t   n       = 0;
    for (size_t i = 0; i < counts.size(); i++) {
        if (counts[i] == 0 && others[i] == 0) {
            refuse(keys[1],
                   "element " + std::to_string(i) + " is 0 and that of '" + keys[2] + "' too: nothing reads the site");
        }
        n += uint64_t(counts[i]) + others[i];
    }
    if (readers.size() != n) {
        refuse(keys[0], "has " + std::to_string(readers.size()) + " elements, '" + keys[1] + "' and '" + keys[2] +
                            "' announce " + std::to_string(n));
    }
    std::sort(readers.begin(), readers.end());
    const auto twice = std::adjacent_find(readers.begin(), readers.end());
    if (twice != readers.end()) {
        refuse(keys[0], "names '" + *twice + "' twice");
    }
}

// A transform that is not undone at run time gives wrong logits, so an unknown one is refused.
void check_transform(const gguf_context * metadata) {
    const std::string name  = ggml_ext_transform_name(metadata);
    bool              known = false;
    for (const char * candidate : transform_names) {
        known = known || name == candidate;
    }
    if (!known) {
        refuse("ggml_ext.transform.name", "is '" + name + "', which this build does not know");
    }
    const std::vector<uint32_t> orders = ggml_ext_read_array<uint32_t>(metadata, "ggml_ext.transform.hadamard");
    for (size_t i = 0; i < orders.size(); i++) {
        const std::string element = "element " + std::to_string(i) + " is " + std::to_string(orders[i]);
        if ((orders[i] & (orders[i] - 1)) != 0) {
            refuse("ggml_ext.transform.hadamard", element + ", not 0 or a power of two");
        }
        if (orders[i] > 1 && !ggml_ext_transform_online(name)) {
            refuse("ggml_ext.transform.hadamard", element + ", but the transform '" + name + "' has no online part");
        }
    }
    const std::vector<float> clips = ggml_ext_read_array<float>(metadata, "ggml_ext.transform.clip");
    for (size_t i = 0; i < clips.size(); i++) {
        if (!(clips[i] > 0.0f && clips[i] <= 1.0f)) {
            refuse("ggml_ext.transform.clip",
                   "element " + std::to_string(i) + " is " + std::to_string(clips[i]) + ", not in (0, 1]");
        }
    }
}

// The lengths that the counts of one key give to the values of another; both of finite values.
void check_fold_values(const gguf_context * metadata, const char * counts_key, bool squares, const char * values_key) {
    uint64_t length = 0;
    for (const uint64_t count : ggml_ext_read_array<uint32_t>(metadata, counts_key)) {
        length += squares ? count * count : count;
    }
    const std::vector<float> values = ggml_ext_read_array<float>(metadata, values_key);
    if (values.size() != length) {
        refuse(values_key, "has " + std::to_string(values.size()) + " elements, '" + counts_key + "' announces " +
                               std::to_string(length));
    }
    for (size_t i = 0; i < values.size(); i++) {
        // A diagonal is divided by, so neither it nor its inverse may leave the floats.
        if (!std::isfinite(values[i]) || (!squares && !std::isnormal(1.0f / values[i]))) {
            refuse(values_key, "element " + std::to_string(i) + " is " + std::to_string(values[i]) +
                                   (squares ? ", which is not finite" : ", which has no inverse"));
        }
    }
}

void check_folds(const gguf_context * metadata) {
    const char * const sizes = "ggml_ext.fold.sizes";
    for (const char * key : { sizes, "ggml_ext.fold.diagonals", "ggml_ext.fold.orders", "ggml_ext.fold.heads" }) {
        if (gguf_find_key(metadata, key) < 0) {
            continue;
        }
        if (gguf_find_key(metadata, sizes) < 0 && ggml_ext_format_version(metadata) == 1) {
            refuse(sizes, std::string("is missing beside '") + key + "'");
        }
        if (ggml_ext_transform_name(metadata) == "none") {
            refuse(key, "says what a transform folded, but key 'ggml_ext.transform.name' is 'none'");
        }
    }
    check_fold_values(metadata, sizes, false, "ggml_ext.fold.diagonals");
    check_fold_values(metadata, "ggml_ext.fold.orders", true, "ggml_ext.fold.heads");
}

void check_value(const gguf_context * metadata, const char * key, std::initializer_list<uint32_t> allowed) {
    const int64_t id = gguf_find_key(metadata, key);
    if (id < 0) {
        return;
    }
    std::string names;
    for (const uint32_t value : allowed) {
        if (value == gguf_get_val_u32(metadata, id)) {
            return;
        }
        names += (names.empty() ? "" : ", ") + std::to_string(value);
    }
    refuse(key, "is " + std::to_string(gguf_get_val_u32(metadata, id)) + ", not one of " + names);
}

// The ids of three keys that stand together; false where the file has none of them.
bool find_three(const gguf_context * metadata, const char * const (&keys)[3], int64_t (&ids)[3]) {
    std::transform(std::begin(keys), std::end(keys), ids,
                   [metadata](const char * key) { return gguf_find_key(metadata, key); });
    const int64_t present = *std::max_element(std::begin(ids), std::end(ids));
    if (present < 0) {
        return false;
    }
    for (int i = 0; i < 3; i++) {
        if (ids[i] < 0) {
            refuse(keys[i], std::string("is missing beside '") + gguf_get_key(metadata, present) + "'");
        }
    }
    return true;
}

void check_losses(const gguf_context * metadata) {
    const char * const keys[] = { "ggml_ext.loss.tensors", "ggml_ext.loss.types", "ggml_ext.loss.values" };
    int64_t            ids[3];
    if (!find_three(metadata, keys, ids)) {
        return;
    }
    const uint64_t tensors = gguf_get_arr_n(metadata, ids[0]), types = gguf_get_arr_n(metadata, ids[1]);
    if (gguf_get_arr_n(metadata, ids[2]) != tensors * types) {
        refuse(keys[2], "has " + std::to_string(gguf_get_arr_n(metadata, ids[2])) + " elements, not one for each of " +
                            std::to_string(tensors) + " tensors and " + std::to_string(types) + " types");
    }
}

void check_errors(const gguf_context * metadata) {
    const char * const keys[] = { "ggml_ext.error.tensors", "ggml_ext.error.values", "ggml_ext.error.kind" };
    int64_t            ids[3];
    if (!find_three(metadata, keys, ids)) {
        return;
    }
    if (gguf_get_arr_n(metadata, ids[0]) != gguf_get_arr_n(metadata, ids[1])) {
        refuse(keys[1], "has " + std::to_string(gguf_get_arr_n(metadata, ids[1])) + " elements, '" + keys[0] +
                            "' has " + std::to_string(gguf_get_arr_n(metadata, ids[0])));
    }
    const std::string kind = gguf_get_val_str(metadata, ids[2]);
    if (kind != "output" && kind != "weight") {
        refuse(keys[2], "is '" + kind + "', not 'output' or 'weight'");
    }
}

}  // namespace

uint32_t ggml_ext_format_version(const gguf_context * metadata) {
    const int64_t id = gguf_find_key(metadata, "ggml_ext.version");
    return id < 0 ? 1 : gguf_get_val_u32(metadata, id);
}

std::vector<std::string> ggml_ext_read_strings(const gguf_context * metadata, const char * key) {
    const int64_t            id = gguf_find_key(metadata, key);
    std::vector<std::string> strings;
    for (size_t i = 0; id >= 0 && i < gguf_get_arr_n(metadata, id); i++) {
        strings.emplace_back(gguf_get_arr_str(metadata, id, i));
    }
    return strings;
}

std::string ggml_ext_transform_name(const gguf_context * metadata) {
    const int64_t id = gguf_find_key(metadata, "ggml_ext.transform.name");
    return id < 0 ? "none" : gguf_get_val_str(metadata, id);
}

bool ggml_ext_transform_online(const std::string & name) {
    return name == "hadamard" || name == "flatquant";
}

void ggml_ext_llama_check_metadata(const gguf_context * metadata) {
    bool extended = false;
    for (int64_t id = 0; id < gguf_get_n_kv(metadata); id++) {
        if (std::strncmp(gguf_get_key(metadata, id), prefix, sizeof(prefix) - 1) == 0) {
            check_known(metadata, id);
            extended = true;
        }
    }
    if (extended) {
        check_version(metadata);
        check_sites(metadata);
        check_transform(metadata);
        check_folds(metadata);
        check_value(metadata, "ggml_ext.activation.bits", { 4, 8 });
        check_value(metadata, "ggml_ext.activation.group", { 0, 32, 256 });
        check_errors(metadata);
        check_losses(metadata);
    }
}
