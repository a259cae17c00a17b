// The keys under "ggml_ext." of a GGUF file. docs/gguf.md specifies them.

#pragma once

struct gguf_context;

// Throws std::runtime_error, which names the key, when the file holds a key under "ggml_ext." that
// this build does not know, one of the wrong type, or a value that it cannot honour (a newer version,
// an unknown transform). A file without such keys is left alone.
void ggml_ext_llama_check_metadata(const struct gguf_context * metadata);
