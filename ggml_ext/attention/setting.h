// The switch of quantised attention, for every backend. docs/attention.md has the modes.

#ifndef GGML_EXT_ATTENTION_SETTING_H
#define GGML_EXT_ATTENTION_SETTING_H

#include "ggml.h"

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

#define GGML_EXT_ATTENTION_MAX_HEAD 1024  // channels of a head of K and of V

enum ggml_ext_attention_mode {
    GGML_EXT_ATTENTION_OFF,
    GGML_EXT_ATTENTION_HALF,  // softmax weights of 16 bits
    GGML_EXT_ATTENTION_FULL,  // of 8 bits
};

struct ggml_ext_attention_setting {
    enum ggml_ext_attention_mode mode;
    bool                         f16;     // f16 caches as well
    bool                         smooth;  // K smoothing, for f16 K
    bool                         fast;    // only where this processor has kernels of its own
};

#define GGML_EXT_ATTENTION_MODES "default, off, half, full, half/f16, full/f16, half/f16/smooth or full/f16/smooth"

// Whether mode is one of GGML_EXT_ATTENTION_MODES.
GGML_API bool ggml_ext_attention_known(const char * mode);

// The process's setting: ggml_ext_attention_set, or else the environment's GGML_EXT_ATTN as it was at the first call. With a
// wrong value no model loads (transform/settings.h); a graph without a model is computed as under "off", and the log says so.
GGML_API struct ggml_ext_attention_setting ggml_ext_attention_setting(void);

#ifdef __cplusplus
}
#endif

#endif  // GGML_EXT_ATTENTION_SETTING_H
