#include "settings.h"

#include "attention/setting.h"
#include "kv/setting.h"
#include "sampler/chain.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

static void check(const char * variable, bool (*known)(const char * value), const char * values) {
    const char * value = std::getenv(variable);
    if (value && !known(value)) {
        throw std::runtime_error(std::string("ggml-ext: environment variable ") + variable + " is '" + value +
                                 "'; set it to " + values);
    }
}

static bool kv_known(const char * value) {
    ggml_ext_kv_setting setting;
    return ggml_ext_kv_parse(value, setting);
}

void ggml_ext_check_settings() {
    check("GGML_EXT_ATTN", ggml_ext_attention_known, GGML_EXT_ATTENTION_MODES);
    check("GGML_EXT_KV", kv_known, GGML_EXT_KV_VALUES);
    check("GGML_EXT_SAMPLER", ggml_ext_sampler_known, "off or fused");
}
