// The keys under "ggml_ext." of a GGUF file. docs/gguf.md specifies them.

#pragma once

#include "gguf.h"

#include <string>
#include <vector>

// Throws std::runtime_error, which names the key, when the file holds a key under "ggml_ext." that
// this build does not know, one of the wrong type, or a value that it cannot honour (a newer version,
// an unknown transform, a clip outside (0, 1]). A file without such keys is left alone.
void ggml_ext_llama_check_metadata(const struct gguf_context * metadata);

// The readers below expect metadata that has passed the check.

// ggml_ext.version, 1 where it is absent.
uint32_t ggml_ext_format_version(const gguf_context * metadata);

// ggml_ext.transform.name, "none" where it is absent.
std::string ggml_ext_transform_name(const gguf_context * metadata);

// Whether a transform of this name has a part that runs with the model; the others are folded into the
// weights.
bool ggml_ext_transform_online(const std::string & name);

// Elements of an array key of that type, none where it is absent.
template <typename T> std::vector<T> ggml_ext_read_array(const gguf_context * metadata, const char * key) {
    const int64_t id = gguf_find_key(metadata, key);
    if (id < 0) {
        return {};
    }
    const T * data = static_cast<const T *>(gguf_get_arr_data(metadata, id));
    return std::vector<T>(data, data + gguf_get_arr_n(metadata, id));
}

// The same of an array of strings.
std::vector<std::string> ggml_ext_read_strings(const gguf_context * metadata, const char * key);
