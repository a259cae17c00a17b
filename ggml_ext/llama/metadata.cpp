#include "metadata.h"

#include "ggml-ext.h"
#include "gguf.h"

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace {

struct known_key {
    const char * name;
    gguf_type    type;
};

constexpr char prefix[] = "ggml_ext.";

constexpr known_key known_keys[] = {
    { "ggml_ext.version",             GGUF_TYPE_UINT32 },
    { "ggml_ext.rounding",            GGUF_TYPE_STRING },
    { "ggml_ext.transform.name",      GGUF_TYPE_STRING },
    { "ggml_ext.calibration.hash",    GGUF_TYPE_STRING },
    { "ggml_ext.calibration.samples", GGUF_TYPE_UINT32 },
    { "ggml_ext.calibration.length",  GGUF_TYPE_UINT32 },
    { "ggml_ext.calibration.seed",    GGUF_TYPE_UINT32 },
};

[[noreturn]] void refuse(const std::string & key, const std::string & why) {
    throw std::runtime_error("ggml-ext: key '" + key + "' " + why);
}

void check_known(const gguf_context * metadata, int64_t id) {
    const char * key = gguf_get_key(metadata, id);
    for (const known_key & known : known_keys) {
        if (std::strcmp(key, known.name) == 0) {
            if (gguf_get_kv_type(metadata, id) != known.type) {
                refuse(key, std::string("must be of type ") + gguf_type_name(known.type) + ", is " +
                                gguf_type_name(gguf_get_kv_type(metadata, id)));
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

// A transform that is not undone at run time gives wrong logits, so an unknown one is refused.
void check_transform(const gguf_context * metadata) {
    const int64_t id = gguf_find_key(metadata, "ggml_ext.transform.name");
    if (id >= 0 && std::strcmp(gguf_get_val_str(metadata, id), "none") != 0) {
        refuse("ggml_ext.transform.name",
               std::string("is '") + gguf_get_val_str(metadata, id) + "', this build knows only 'none'");
    }
}

}  // namespace

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
        check_transform(metadata);
    }
}
