#include "setting.h"

#include <charconv>
#include <cstring>
#include <string_view>

static bool kv_number(std::string_view text, uint32_t & number) {
    const char * end   = text.data() + text.size();
    const auto   found = std::from_chars(text.data(), end, number);
    return found.ec == std::errc() && found.ptr == end;
}

// 512K, 300M, 4G: powers of 1024.
static bool kv_bytes(std::string_view text, uint64_t & bytes) {
    static constexpr std::string_view units  = "KMG";
    const size_t                      unit   = text.empty() ? std::string_view::npos : units.find(text.back());
    uint32_t                          number = 0;
    if (unit == std::string_view::npos || !kv_number(text.substr(0, text.size() - 1), number) || number == 0) {
        return false;
    }
    bytes = uint64_t(number) << (10 * (unit + 1));
    return true;
}

static bool kv_budget(std::string_view text, ggml_ext_kv_setting & setting) {
    uint32_t number = 0;
    setting.share = 0, setting.tokens = 0, setting.bytes = 0;
    if (kv_bytes(text, setting.bytes)) {
        return true;
    }
    if (!text.empty() && text.back() == '%') {
        if (!kv_number(text.substr(0, text.size() - 1), number) || number < 1 || number > 100) {
            return false;
        }
        setting.share = number / 100.0;
        return true;
    }
    return kv_number(text, setting.tokens) && setting.tokens > 0;
}

static bool kv_item(std::string_view item, ggml_ext_kv_setting & setting) {
    const size_t equals = item.find('=');
    if (equals == std::string_view::npos) {
        return false;
    }
    const std::string_view key = item.substr(0, equals), value = item.substr(equals + 1);
    if (key == "budget") {
        return kv_budget(value, setting);
    }
    if (key == "policy" && setting.paged) {
        for (const auto policy : { ggml_ext_kv_policy::norm, ggml_ext_kv_policy::random, ggml_ext_kv_policy::probe,
                                   ggml_ext_kv_policy::attention }) {
            if (value == ggml_ext_kv_policy_name(policy)) {
                setting.policy = policy;
                return true;
            }
        }
        return false;
    }
    if (key == "cold" && setting.paged) {
        setting.cold = value == "cq2" ? 4 : value == "cq1" ? 8 : 0;
        return setting.cold > 0;
    }
    if (key == "sink") {
        return kv_number(value, setting.sink);
    }
    if (key == "recent") {
        return kv_number(value, setting.recent) && setting.recent > 0;
    }
    return key == "policy" && value == "window" && !setting.paged;
}

const char * ggml_ext_kv_policy_name(ggml_ext_kv_policy policy) {
    static const char * const names[] = { "keep", "norm", "random", "probe", "attention" };
    return names[size_t(policy)];
}

bool ggml_ext_kv_parse(const char * value, ggml_ext_kv_setting & setting) {
    setting = {};
    if (!value || std::strcmp(value, "off") == 0) {
        return true;
    }
    std::string_view rest = value;
    setting.paged         = rest.substr(0, rest.find(',')) == "paged";
    if (rest == "paged") {
        setting.on = true;
        return true;
    }
    rest.remove_prefix(setting.paged ? std::strlen("paged,") : 0);
    bool stays = false;
    while (true) {
        const size_t comma = rest.find(',');
        if (!kv_item(rest.substr(0, comma), setting)) {
            return false;
        }
        stays |= rest.rfind("sink=", 0) == 0 || rest.rfind("recent=", 0) == 0;
        if (comma == std::string_view::npos) {
            break;
        }
        rest.remove_prefix(comma + 1);
    }
    if (stays && setting.paged && setting.policy == ggml_ext_kv_policy::keep && setting.cold == 0) {
        return false;  // nothing is evicted
    }
    setting.on = setting.paged || setting.share > 0 || setting.tokens > 0;
    return setting.on && (setting.paged || setting.bytes == 0);
}
