// The fused sampler as a llama_sampler: what it does to an array of candidates, its errors, seeds and copies, and that
// it agrees with upstream's chain. Breaks if the two interfaces differ, if state is lost or shared, if a NaN gives a
// token, or if upstream's stages come to mean something else.

#include "check.h"
#include "ggml-ext.h"
#include "llama.h"
#include "sampler_cases.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <set>

namespace {

struct sampler_deleter {
    void operator()(llama_sampler * sampler) const { llama_sampler_free(sampler); }
};

using sampler_ptr = std::unique_ptr<llama_sampler, sampler_deleter>;

sampler_ptr make(const ggml_ext_sampler_params & params) {
    return sampler_ptr(ggml_ext_sampler_fused(&params));
}

// Upstream's default order and values.
ggml_ext_sampler_params defaults() {
    ggml_ext_sampler_params params = with_stages({ TOP_K, TYPICAL, TOP_P, MIN_P, TEMPERATURE });
    params.top_k                   = 40;
    params.typical_p               = 0.97f;
    params.top_p                   = 0.95f;
    params.min_p                   = 0.05f;
    params.temperature             = 0.8f;
    params.seed                    = 3;
    return params;
}

sampler_ptr upstream(const ggml_ext_sampler_params & p) {
    sampler_ptr chain(llama_sampler_chain_init(llama_sampler_chain_default_params()));
    for (int32_t i = 0; i < p.n_stages; i++) {
        const int32_t stage = p.stages[i];
        llama_sampler_chain_add(chain.get(), stage == TOP_K   ? llama_sampler_init_top_k(p.top_k) :
                                             stage == TYPICAL ? llama_sampler_init_typical(p.typical_p, p.min_keep) :
                                             stage == TOP_P   ? llama_sampler_init_top_p(p.top_p, p.min_keep) :
                                             stage == MIN_P   ? llama_sampler_init_min_p(p.min_p, p.min_keep) :
                                                                llama_sampler_init_temp(p.temperature));
    }
    llama_sampler_chain_add(chain.get(), llama_sampler_init_dist(p.seed));
    return chain;
}

std::vector<float> random_logits(uint32_t seed, int32_t n, float deviation = 2) {
    std::mt19937                    random(seed);
    std::normal_distribution<float> normal(0, deviation);
    std::vector<float>              logits(static_cast<size_t>(n));
    for (float & l : logits) {
        l = normal(random);
    }
    return logits;
}

std::vector<llama_token_data> candidates_of(const std::vector<float> & logits) {
    std::vector<llama_token_data> data;
    for (const float l : logits) {
        data.push_back({ llama_token(data.size()), l, 0 });
    }
    return data;
}

int32_t sample(const sampler_ptr & sampler, const std::vector<float> & logits) {
    return ggml_ext_sampler_sample_logits(sampler.get(), logits.data(), int32_t(logits.size()));
}

// The token, and the candidates as apply leaves them.
llama_token apply(llama_sampler * sampler, std::vector<llama_token_data> & data) {
    llama_token_data_array array = { data.data(), data.size(), -1, false };
    llama_sampler_apply(sampler, &array);
    CHECK(array.selected >= 0 && array.selected < int64_t(array.size), "selected %d", int(array.selected));
    data.resize(array.size);
    return array.data[array.selected].id;
}

void test_parameters() {
    CHECK(!ggml_ext_sampler_fused(nullptr), "null");
    ggml_ext_sampler_params params = defaults();
    for (float * value : { &params.temperature, &params.top_p, &params.min_p, &params.typical_p }) {
        for (const float wrong : { NAN, INFINITY }) {
            const float right = *value;
            *value            = wrong;
            CHECK(!make(params), "%g", double(wrong));
            *value = right;
        }
    }
    for (const int32_t n : { -1, 9 }) {
        params          = defaults();
        params.n_stages = n;
        CHECK(!make(params), "%d stages", n);
    }
    for (const int32_t stage : { -1, 5, int32_t(TOP_K) }) {
        params           = defaults();
        params.stages[1] = stage;
        CHECK(!make(params), "stage %d", stage);
    }
    CHECK(make(no_stages()) && make(defaults()), "right ones");
}

void test_errors() {
    const sampler_ptr    sampler = make(defaults());
    const sampler_ptr    greedy(llama_sampler_init_greedy());
    std::vector<float>   logits = random_logits(1, 3000);
    std::vector<float>   p(logits.size());
    std::vector<int32_t> ids(logits.size());
    const auto           n = int32_t(logits.size());
    CHECK(ggml_ext_sampler_sample_logits(nullptr, logits.data(), n) == GGML_EXT_E_TYPE, "no sampler");
    CHECK(ggml_ext_sampler_sample_logits(greedy.get(), logits.data(), n) == GGML_EXT_E_TYPE, "another sampler");
    CHECK(ggml_ext_sampler_sample_logits(sampler.get(), nullptr, n) == GGML_EXT_E_TYPE, "no logits");
    CHECK(ggml_ext_sampler_sample_logits(sampler.get(), logits.data(), 0) == GGML_EXT_E_SHAPE, "no vocabulary");
    CHECK(ggml_ext_sampler_kept(sampler.get(), logits.data(), n, nullptr, p.data()) == GGML_EXT_E_TYPE, "no ids");
    CHECK(ggml_ext_sampler_kept(sampler.get(), logits.data(), n, ids.data(), nullptr) == GGML_EXT_E_TYPE, "no p");

    // A sampler that meets an error draws on as if it had not.
    const sampler_ptr other = make(defaults());
    for (const ggml_ext_sampler_params & params : { defaults(), with_temperature(0), no_stages() }) {
        const sampler_ptr each = make(params);
        for (const float wrong : { NAN, -NAN, INFINITY }) {
            for (const size_t at : { size_t(0), size_t(1), size_t(255), size_t(256), size_t(1500), size_t(2999) }) {
                std::vector<float> bad = logits;
                bad[at]                = wrong;
                CHECK(sample(each, bad) == GGML_EXT_E_FINITE, "%g at %zu", double(wrong), at);
                CHECK(ggml_ext_sampler_kept(each.get(), bad.data(), n, ids.data(), p.data()) == GGML_EXT_E_FINITE,
                      "kept");
                sample(sampler, bad);
            }
        }
        CHECK(sample(each, std::vector<float>(700, -INFINITY)) == GGML_EXT_E_FINITE, "nothing finite");
    }
    for (int i = 0; i < 20; i++) {
        CHECK(sample(sampler, logits) == sample(other, logits), "the generator moved in an error");
    }

    std::vector<llama_token_data> data = candidates_of(logits);
    data[77].logit                     = NAN;
    llama_token_data_array array       = { data.data(), data.size(), -1, false };
    llama_sampler_apply(sampler.get(), &array);
    CHECK(array.selected == -1 && array.size == 0 && array.data[array.selected].id == LLAMA_TOKEN_NULL, "NaN in apply");
    array = { data.data(), 0, 5, false };
    llama_sampler_apply(sampler.get(), &array);
    CHECK(array.selected == -1, "no candidates");
}

// apply gives the token of sample_logits and the set of kept, whatever the order of the candidates.
void test_interfaces() {
    for (const int32_t n : { 1, 20, 1000, 5000 }) {
        for (const ggml_ext_sampler_params & params :
             { defaults(), with_top_p(0.9f), with_temperature(0.5f), with_temperature(0) }) {
            const std::vector<float> logits      = random_logits(uint32_t(n), n);
            const sampler_ptr        samplers[4] = { make(params), make(params), make(params), make(params) };
            std::vector<int32_t>     ids(logits.size());
            std::vector<float>       p(logits.size());
            std::mt19937             random(1);
            for (int i = 0; i < 10; i++) {
                const int32_t                 token    = sample(samplers[0], logits);
                std::vector<llama_token_data> inorder  = candidates_of(logits);
                std::vector<llama_token_data> shuffled = inorder;
                std::shuffle(shuffled.begin(), shuffled.end(), random);
                CHECK(apply(samplers[1].get(), inorder) == token, "%d: apply", n);
                CHECK(apply(samplers[2].get(), shuffled) == token, "%d: shuffled", n);

                const int32_t kept = ggml_ext_sampler_kept(samplers[3].get(), logits.data(), n, ids.data(), p.data());
                CHECK(kept == int32_t(inorder.size()) && inorder.size() == shuffled.size(), "%d: kept %d", n, kept);
                const float t   = params.n_stages && params.temperature > 0 ? params.temperature : 1;
                double      sum = 0;
                for (size_t j = 0; j < inorder.size(); j++) {
                    const llama_token_data & c = inorder[j];
                    CHECK(c.id == ids[j] && c.p == p[j] && c.logit == logits[size_t(c.id)] / t, "%d: candidate %zu", n,
                          j);
                    CHECK(std::memcmp(&c, &shuffled[j], sizeof(c)) == 0, "%d: shuffled candidate %zu", n, j);
                    sum += c.p;
                }
                CHECK(std::fabs(sum - 1) < 1e-5, "%d: sum of p %g", n, sum);
            }
        }
    }
    // Ids that are not consecutive, as after a sampler that drops some.
    std::vector<float>            logits = random_logits(9, 4000);
    std::vector<llama_token_data> some;
    for (const llama_token_data & c : candidates_of(logits)) {
        if (c.id % 3) {
            some.push_back(c);
        } else {
            logits[size_t(c.id)] = -INFINITY;
        }
    }
    const sampler_ptr both[2] = { make(with_top_p(0.8f)), make(with_top_p(0.8f)) };
    CHECK(apply(both[0].get(), some) == sample(both[1], logits), "a part of the vocabulary");
}

std::vector<int32_t> sequence(const sampler_ptr & sampler, int n) {
    const std::vector<float> logits = random_logits(4, 2000, 0.5f);
    std::vector<int32_t>     tokens;
    for (int i = 0; i < n; i++) {
        tokens.push_back(sample(sampler, logits));
    }
    return tokens;
}

void test_state() {
    ggml_ext_sampler_params params  = with_top_p(0.9f);
    const sampler_ptr       sampler = make(params);
    const auto              first   = sequence(sampler, 40);
    CHECK(std::set<int32_t>(first.begin(), first.end()).size() > 30, "draws differ");
    CHECK(sequence(make(params), 40) == first, "the seed repeats");

    const sampler_ptr copy(llama_sampler_clone(sampler.get()));
    const sampler_ptr target = make(params);
    llama_sampler_copy(sampler.get(), target.get());
    const auto next = sequence(sampler, 40);
    CHECK(next != first && sequence(copy, 40) == next, "a clone goes on where the sampler is");
    CHECK(sequence(target, 40) == next, "llama_sampler_copy");
    llama_sampler_reset(sampler.get());
    llama_sampler_accept(sampler.get(), 5);
    CHECK(sequence(sampler, 40) == first, "reset");

    params.seed++;
    CHECK(sequence(make(params), 40) != first, "another seed");
    params.seed             = LLAMA_DEFAULT_SEED;
    const sampler_ptr free_ = make(params);
    const auto        drawn = sequence(free_, 40);
    llama_sampler_reset(free_.get());
    CHECK(sequence(free_, 40) != drawn && sequence(make(params), 40) != drawn, "random seeds");
    CHECK(std::string(llama_sampler_name(sampler.get())) == "fused", "name");
}

// Upstream works in float, so the cut of these random cases is far enough from a token's end to be the same.
void test_upstream() {
    std::mt19937 random(8);
    const auto uniform = [&](float from, float to) { return std::uniform_real_distribution<float>(from, to)(random); };
    for (uint32_t i = 0; i < 300; i++) {
        const std::vector<float> logits = random_logits(i, i % 2 ? 200 : 3000, uniform(1, 4));
        ggml_ext_sampler_params  params = no_stages();
        std::vector<int32_t>     stages = { TOP_K, TYPICAL, TOP_P, MIN_P, TEMPERATURE };
        std::shuffle(stages.begin(), stages.end(), random);
        params.n_stages = int32_t(random() % 6);
        std::copy(stages.begin(), stages.begin() + params.n_stages, params.stages);
        params.top_k                       = int32_t(random() % 300);
        params.typical_p                   = uniform(0.3f, 1.05f);
        params.top_p                       = uniform(0.3f, 1.05f);
        params.min_p                       = uniform(-0.01f, 0.1f);
        params.temperature                 = uniform(0.3f, 2);
        params.min_keep                    = random() % 10;
        const sampler_ptr             ours = make(params), theirs = upstream(params);
        std::vector<llama_token_data> a = candidates_of(logits), b = candidates_of(logits);
        apply(ours.get(), a);
        apply(theirs.get(), b);
        std::sort(b.begin(), b.end(), [](auto & x, auto & y) { return x.id < y.id; });
        CHECK(a.size() == b.size(), "%u: %zu kept, upstream %zu", i, a.size(), b.size());
        for (size_t j = 0; j < std::min(a.size(), b.size()); j++) {
            CHECK(
                a[j].id == b[j].id && a[j].logit == b[j].logit && std::fabs(a[j].p - b[j].p) < 1e-5f * (a[j].p + 1e-3f),
                "%u: token %d with p %g, upstream %d with %g", i, a[j].id, double(a[j].p), b[j].id, double(b[j].p));
        }
        params.temperature = 0;
        if (params.n_stages && params.stages[params.n_stages - 1] == TEMPERATURE) {
            b = candidates_of(logits);
            CHECK(sample(make(params), logits) == apply(upstream(params).get(), b), "%u: greedy", i);
        }
    }
}

// Behind upstream's bias and penalties in a chain.
void test_chain() {
    const std::vector<float> logits = random_logits(2, 50, 0.1f);
    const llama_logit_bias   bias[] = {
        { 7, -INFINITY },
        { 9, 5.0f      }
    };
    sampler_ptr chain(llama_sampler_chain_init(llama_sampler_chain_default_params()));
    llama_sampler_chain_add(chain.get(), llama_sampler_init_logit_bias(50, 2, bias));
    llama_sampler_chain_add(chain.get(), llama_sampler_init_penalties(50, 64, 1.0f, 0, 3.0f));
    llama_sampler_chain_add(chain.get(), make(with_top_k(49)).release());
    const sampler_ptr     both(llama_sampler_clone(chain.get()));
    std::set<llama_token> seen;
    for (int i = 0; i < 40; i++) {
        std::vector<llama_token_data> data = candidates_of(logits), again = data;
        const llama_token             token = apply(chain.get(), data);
        CHECK(token == apply(both.get(), again), "a clone of the chain");
        CHECK(token != 7, "a banned token");
        seen.insert(token);
        llama_sampler_accept(chain.get(), token);
        llama_sampler_accept(both.get(), token);
    }
    CHECK(seen.count(9) == 1 && seen.size() > 20, "%zu tokens", seen.size());
}

}  // namespace

int main() {
    test_parameters();
    test_errors();
    test_interfaces();
    test_state();
    test_upstream();
    test_chain();
    return check_done();
}
