// GGML_EXT_SAMPLER=fused on upstream's sampler chains: what is replaced, what stays and why, and that the new sampler
// has the old ones' parameters. A stage left out or taken over from the wrong place would show in the names; a
// parameter that gets lost, in the candidates that are left.

#include "check.h"
#include "ggml-ext.h"
#include "llama.h"
#include "sampler/chain.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

static constexpr int32_t n_vocab = 100;

static std::vector<std::string> messages;  // of ggml-ext, since the last clear()

static void collect(ggml_log_level, const char * text, void *) {
    if (std::strstr(text, "ggml-ext")) {
        messages.push_back(text);
    }
}

static ggml_ext_sampler_chain_values usual() {
    ggml_ext_sampler_chain_values values = {};
    values.fused.temperature             = 0.8f;
    values.fused.top_k                   = 40;
    values.fused.top_p                   = 0.95f;
    values.fused.min_p                   = 0.05f;
    values.fused.typical_p               = 0.9f;
    values.fused.min_keep                = 1;
    values.fused.seed                    = 7;
    return values;
}

// The sampler of upstream's for one word; the words are those of llama_sampler_name.
static llama_sampler * make(const std::string & word, const ggml_ext_sampler_chain_values & v) {
    const ggml_ext_sampler_params & p    = v.fused;
    const llama_logit_bias          bias = { 3, 1.0f };
    if (word == "logit-bias") {
        return llama_sampler_init_logit_bias(n_vocab, 1, &bias);
    }
    if (word == "penalties") {
        return llama_sampler_init_penalties(n_vocab, 64, 1.1f, 0.0f, 0.0f);
    }
    if (word == "top-n-sigma") {
        return llama_sampler_init_top_n_sigma(2.0f);
    }
    if (word == "top-k") {
        return llama_sampler_init_top_k(p.top_k);
    }
    if (word == "typical") {
        return llama_sampler_init_typical(p.typical_p, p.min_keep);
    }
    if (word == "top-p") {
        return llama_sampler_init_top_p(p.top_p, p.min_keep);
    }
    if (word == "min-p") {
        return llama_sampler_init_min_p(p.min_p, p.min_keep);
    }
    if (word == "xtc" || word == "?xtc") {
        return llama_sampler_init_xtc(word == "xtc" ? 0.5f : 0.0f, 0.1f, p.min_keep, p.seed);
    }
    if (word == "temp") {
        return llama_sampler_init_temp(p.temperature);
    }
    if (word == "temp-ext") {
        return llama_sampler_init_temp_ext(p.temperature, v.temperature_range, 1.0f);
    }
    if (word == "mirostat-v2") {
        return llama_sampler_init_mirostat_v2(p.seed, 5.0f, 0.1f);
    }
    return llama_sampler_init_dist(p.seed);
}

static std::vector<std::string> split(const std::string & text) {
    std::vector<std::string> words;
    for (size_t at = 0; at < text.size();) {
        const size_t end = std::min(text.find(' ', at), text.size());
        words.push_back(text.substr(at, end - at));
        at = end + 1;
    }
    return words;
}

static llama_sampler * make_chain(const std::string & words, const ggml_ext_sampler_chain_values & values) {
    llama_sampler * chain = llama_sampler_chain_init(llama_sampler_chain_default_params());
    for (const std::string & word : split(words)) {
        llama_sampler_chain_add(chain, make(word, values));
    }
    return chain;
}

static bool is_fused(llama_sampler * sampler) {
    return ggml_ext_sampler_seed(sampler) >= 0;
}

static std::string names_of(llama_sampler * chain) {
    std::string names;
    for (int32_t i = 0; i < llama_sampler_chain_n(chain); i++) {
        llama_sampler * sampler = llama_sampler_chain_get(chain, i);
        names += (i ? " " : "") + std::string(is_fused(sampler) ? "FUSED" : llama_sampler_name(sampler));
    }
    return names;
}

static void expect(const std::string & before, const std::string & after, const std::string & message,
                   const ggml_ext_sampler_chain_values & values) {
    for (int i = 0; i < 2; i++) {
        messages.clear();
        llama_sampler * chain = make_chain(before, values);
        ggml_ext_sampler_chain(chain, values);
        const std::string found = names_of(chain);
        CHECK(found == after, "'%s' became '%s', not '%s'", before.c_str(), found.c_str(), after.c_str());
        if (i == 0) {
            const std::string line = messages.size() == 1 ? messages[0] : "";
            CHECK(line.find(message) != std::string::npos, "'%s': %zu lines, '%s' has no '%s'", before.c_str(),
                  messages.size(), line.c_str(), message.c_str());
        } else {
            CHECK(messages.empty(), "'%s' is told twice: %s", before.c_str(), messages[0].c_str());
        }
        llama_sampler_free(chain);
    }
}

static void test_replaced() {
    const auto values = usual();
    expect("logit-bias penalties top-k typical top-p min-p ?xtc temp-ext dist", "logit-bias penalties FUSED",
           "one sampler for top-k, typical, top-p, min-p, temp-ext, dist", values);
    expect("temp min-p dist", "FUSED", "one sampler for temp, min-p, dist", values);
    expect("penalties dist", "penalties FUSED", "one sampler for dist", values);
    expect("top-n-sigma top-p dist", "top-n-sigma FUSED", "one sampler for top-p, dist", values);
    auto off            = values;
    off.fused.top_k     = 0;
    off.fused.typical_p = 1.0f;
    expect("penalties top-k typical top-p min-p dist", "penalties ?top-k ?typical FUSED",
           "one sampler for top-p, min-p, dist", off);
}

static void test_left_alone() {
    const auto values = usual();
    const auto same   = [](const char * words, const char * why, const ggml_ext_sampler_chain_values & v) {
        expect(words, words, std::string("leaves a sampler chain as it is: ") + why, v);
    };
    same("top-k xtc temp-ext dist", "xtc stands behind top-k", values);
    same("min-p penalties dist", "penalties stands behind min-p", values);
    same("temp mirostat-v2", "it ends with mirostat-v2", values);
    same("top-k top-p top-k dist", "top-k stands in it twice", values);
    same("temp temp-ext dist", "temp-ext stands in it twice", values);
    same("", "it is empty", values);
    auto other              = values;
    other.temperature_range = 0.5f;
    same("top-k temp-ext dist", "its temperature is dynamic", other);
    other         = values;
    other.backend = true;
    same("top-k temp dist", "it is to run on a backend", other);
}

static std::vector<llama_token_data> candidates() {
    std::vector<llama_token_data> data(n_vocab);
    for (int32_t i = 0; i < n_vocab; i++) {
        data[i] = { i, 0.05f * ((i * 37) % n_vocab), 0.0f };
    }
    return data;
}

// Candidates and their probabilities behind a chain, and the token.
static std::pair<std::vector<float>, llama_token> apply(llama_sampler * chain) {
    auto                   data  = candidates();
    llama_token_data_array array = { data.data(), data.size(), -1, false };
    llama_sampler_apply(chain, &array);
    std::vector<float> probabilities(n_vocab, 0.0f);
    for (size_t i = 0; i < array.size; i++) {
        probabilities[array.data[i].id] = array.data[i].p;
    }
    return { probabilities, array.data[array.selected].id };
}

// One parameter at a time differs from its off value, so each is seen to arrive.
static void test_parameters() {
    auto off              = usual();
    off.fused.temperature = 1.0f;
    off.fused.top_k       = 0;
    off.fused.top_p       = 1.0f;
    off.fused.min_p       = 0.0f;
    off.fused.typical_p   = 1.0f;
    std::vector<ggml_ext_sampler_chain_values> settings(6, off);
    settings[0].fused.temperature = 0.3f;
    settings[1].fused.top_k       = 9;
    settings[2].fused.top_p       = 0.7f;
    settings[3].fused.min_p       = 0.3f;
    settings[4].fused.typical_p   = 0.6f;
    settings[5].fused.top_p       = 0.01f;
    settings[5].fused.min_keep    = 11;
    for (size_t i = 0; i < settings.size(); i++) {
        llama_sampler * stock = make_chain("top-k typical top-p min-p temp dist", settings[i]);
        llama_sampler * ours  = make_chain("top-k typical top-p min-p temp dist", settings[i]);
        ggml_ext_sampler_chain(ours, settings[i]);
        const auto expected = apply(stock).first;
        const auto found    = apply(ours).first;
        for (int32_t id = 0; id < n_vocab; id++) {
            CHECK((found[id] > 0) == (expected[id] > 0) && std::abs(found[id] - expected[id]) < 1e-5f,
                  "setting %zu, token %d: %g, upstream %g", i, id, found[id], expected[id]);
        }
        llama_sampler_free(stock);
        llama_sampler_free(ours);
    }
}

static std::vector<llama_token> draw(llama_sampler * chain) {
    std::vector<llama_token> tokens;
    for (int i = 0; i < 30; i++) {
        tokens.push_back(apply(chain).second);
    }
    return tokens;
}

// A server clones and copies chains while it speculates, and resets them.
static void test_state() {
    auto            values = usual();
    llama_sampler * chain  = make_chain("penalties top-k temp dist", values);
    ggml_ext_sampler_chain(chain, values);
    llama_sampler * fused = llama_sampler_chain_get(chain, 1);
    CHECK(ggml_ext_sampler_seed(fused) == 7, "seed %lld", (long long) ggml_ext_sampler_seed(fused));

    const auto      first    = draw(chain);
    llama_sampler * clone    = llama_sampler_clone(chain);
    const auto      expected = draw(chain);
    CHECK(expected != first, "the generator does not go on");
    CHECK(draw(clone) == expected, "a clone draws otherwise");
    llama_sampler_reset(chain);
    CHECK(draw(chain) == first, "a reset does not repeat");
    llama_sampler_copy(chain, clone);
    CHECK(draw(clone) == expected, "a copy draws otherwise");
    CHECK(draw(chain) == expected, "the copied chain has moved");
    llama_sampler_free(clone);
    llama_sampler_free(chain);

    values.fused.seed = LLAMA_DEFAULT_SEED;
    chain             = make_chain("dist", values);
    CHECK(ggml_ext_sampler_seed(llama_sampler_chain_get(chain, 0)) == GGML_EXT_E_TYPE, "upstream's dist is no fused");
    ggml_ext_sampler_chain(chain, values);
    const int64_t seed = ggml_ext_sampler_seed(llama_sampler_chain_get(chain, 0));
    CHECK(seed >= 0 && seed <= UINT32_MAX, "random seed %lld", (long long) seed);
    llama_sampler_free(chain);
    CHECK(ggml_ext_sampler_seed(nullptr) == GGML_EXT_E_TYPE, "seed of nothing");
}

int main() {
    setenv("GGML_EXT_SAMPLER", "fused", 1);
    llama_log_set(collect, nullptr);
    test_replaced();
    test_left_alone();
    test_parameters();
    test_state();
    return check_done();
}
