// What GGML_EXT_KV says.

#pragma once

#include <cstdint>

#define GGML_EXT_KV_VALUES                                                                                          \
    "off; paged, with ,budget=50% ,budget=TOKENS or ,budget=4G, with ,policy=norm|random|probe|attention, with "    \
    ",cold=cq2|cq1, and with either ,sink=N ,recent=N; or budget=25% or budget=TOKENS with ,policy=window ,sink=N " \
    ",recent=N"

// What goes where blocks are short: nothing; of each list the slots of the largest keys; any; those of the lowest scores by
// the model's probes; those that the latest queries look at least. Their numbers are in saved states.
enum class ggml_ext_kv_policy { keep, norm, random, probe, attention };

const char * ggml_ext_kv_policy_name(ggml_ext_kv_policy policy);

struct ggml_ext_kv_setting {
    bool               on     = false;
    bool               paged  = false;
    double             share  = 0;  // of the context's cells
    uint32_t           tokens = 0;  // per sequence
    uint64_t           bytes  = 0;  // of a paged cache; with none of the three it is as large as upstream's
    ggml_ext_kv_policy policy = ggml_ext_kv_policy::keep;  // of a paged cache
    int                cold   = 0;                         // channels of a code of old tokens; 0: they stay rows
    uint32_t           sink   = 16;                        // first tokens of a sequence that stay
    uint32_t           recent = 64;                        // latest tokens that stay whatever comes

    // Whether there is to be less memory than llama.cpp would take, or less is kept.
    bool is_bounded() const {
        return share > 0 || tokens > 0 || bytes > 0 || cold > 0 || policy != ggml_ext_kv_policy::keep;
    }
};

// Reads the value of GGML_EXT_KV; null is off. False where it is none of GGML_EXT_KV_VALUES.
bool ggml_ext_kv_parse(const char * value, ggml_ext_kv_setting & setting);
