// What the environment may say to ggml-ext: GGML_EXT_ATTN, GGML_EXT_KV, GGML_EXT_SAMPLER and GGML_EXT_ACT
// (activation.h). A wrong value fails the load of a model, before any work; no library function ends the process.

#pragma once

// Throws std::runtime_error with a line that names the variable, its value and the values that there are, if
// GGML_EXT_ATTN, GGML_EXT_KV or GGML_EXT_SAMPLER has a value that nothing knows.
void ggml_ext_check_settings();
