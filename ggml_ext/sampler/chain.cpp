#include "chain.h"

#include "llama-impl.h"
#include "llama.h"

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <string>

namespace {

constexpr char variable[] = "GGML_EXT_SAMPLER";

struct stage_name {
    const char *           name;  // llama_sampler_name
    ggml_ext_sampler_stage stage;
};

constexpr stage_name stage_names[] = {
    { "top-k",    GGML_EXT_SAMPLER_TOP_K       },
    { "typical",  GGML_EXT_SAMPLER_TYPICAL     },
    { "top-p",    GGML_EXT_SAMPLER_TOP_P       },
    { "min-p",    GGML_EXT_SAMPLER_MIN_P       },
    { "temp",     GGML_EXT_SAMPLER_TEMPERATURE },
    { "temp-ext", GGML_EXT_SAMPLER_TEMPERATURE },
};

bool is_fused(const char * value) {
    return std::strcmp(value, "fused") == 0;
}

bool wants_fused() {
    const char * value = std::getenv(variable);
    return value && is_fused(value);
}

// A server makes a chain for every request.
bool first_time(const std::string & message) {
    static std::mutex            mutex;
    static std::set<std::string> seen;
    std::lock_guard<std::mutex>  lock(mutex);
    return seen.insert(message).second;
}

const char * name_at(llama_sampler * chain, int32_t i) {
    return llama_sampler_name(llama_sampler_chain_get(chain, i));
}

const stage_name * find_stage(const char * name) {
    for (const stage_name & known : stage_names) {
        if (std::strcmp(known.name, name) == 0) {
            return &known;
        }
    }
    return nullptr;
}

// Upstream puts a sampler that does nothing, "?top-k", where a parameter turns one off.
bool does_nothing(const char * name) {
    return name[0] == '?';
}

// The end of a chain that one sampler can replace.
struct chain_end {
    int32_t                 first = 0;  // its first sampler
    ggml_ext_sampler_params params;
    std::string             names;
    std::string             obstacle;  // empty: it can
};

void add_stage(chain_end & end, const stage_name & stage) {
    for (int32_t i = 0; i < end.params.n_stages; i++) {
        if (end.params.stages[i] == stage.stage) {
            end.obstacle = std::string(stage.name) + " stands in it twice";
            return;
        }
    }
    end.params.stages[end.params.n_stages++] = stage.stage;
    end.names += std::string(stage.name) + ", ";
}

chain_end find_end(llama_sampler * chain, const ggml_ext_sampler_chain_values & values) {
    chain_end end;
    end.params          = values.fused;
    end.params.n_stages = 0;

    const int32_t last = llama_sampler_chain_n(chain) - 1;
    if (last < 0 || std::strcmp(name_at(chain, last), "dist") != 0) {
        end.obstacle = last < 0 ? "it is empty" : std::string("it ends with ") + name_at(chain, last);
        return end;
    }
    end.first = last;
    for (int32_t i = 0; i < last && end.obstacle.empty(); i++) {
        const char *       name  = name_at(chain, i);
        const stage_name * stage = find_stage(name);
        if (stage) {
            if (end.first == last) {
                end.first = i;
            }
            add_stage(end, *stage);
        } else if (end.first < last && !does_nothing(name)) {
            end.obstacle = std::string(name) + " stands behind " + name_at(chain, end.first);
        }
        if (stage && std::strcmp(name, "temp-ext") == 0 && values.temperature_range > 0) {
            end.obstacle = "its temperature is dynamic";
        }
    }
    end.names += "dist";
    return end;
}

}  // namespace

bool ggml_ext_sampler_known(const char * value) {
    return is_fused(value) || std::strcmp(value, "off") == 0;
}

void ggml_ext_sampler_chain(llama_sampler * chain, const ggml_ext_sampler_chain_values & values) {
    static const bool wanted = wants_fused();
    if (!wanted) {
        return;
    }
    chain_end       end   = find_end(chain, values);
    llama_sampler * fused = nullptr;
    if (values.backend) {
        end.obstacle = "it is to run on a backend";
    } else if (end.obstacle.empty()) {
        fused = ggml_ext_sampler_fused(&end.params);
        if (!fused) {
            end.obstacle = "the fused sampler refuses its parameters";
        }
    }
    if (!fused) {
        if (first_time(end.obstacle)) {
            LLAMA_LOG_WARN("ggml-ext: %s=fused leaves a sampler chain as it is: %s\n", variable, end.obstacle.c_str());
        }
        return;
    }
    for (int32_t i = llama_sampler_chain_n(chain) - 1; i >= end.first; i--) {
        llama_sampler_free(llama_sampler_chain_remove(chain, i));
    }
    llama_sampler_chain_add(chain, fused);
    if (first_time(end.names)) {
        LLAMA_LOG_INFO("ggml-ext: %s=fused: one sampler for %s\n", variable, end.names.c_str());
    }
}
