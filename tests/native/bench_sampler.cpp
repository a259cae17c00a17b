// The fused sampler against upstream's chain with the same parameters, in one process: microseconds per token, medians
// of interleaved runs. "logits" is ggml_ext_sampler_sample_logits; "apply" goes through the array of candidates, as
// llama_sampler_sample does. Upstream's and apply's time contains the building of that array.
//
// bench_sampler [substring of a chain's name]

#include "ggml-ext.h"
#include "llama.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

namespace {

struct chain_case {
    const char *            name;
    ggml_ext_sampler_params params;
};

enum : int32_t {
    K = GGML_EXT_SAMPLER_TOP_K,
    Y = GGML_EXT_SAMPLER_TYPICAL,
    P = GGML_EXT_SAMPLER_TOP_P,
    M = GGML_EXT_SAMPLER_MIN_P,
    T = GGML_EXT_SAMPLER_TEMPERATURE
};

constexpr uint32_t seed = 1;

const chain_case cases[] = {
    { "k 40, p 0.95, min-p 0.05, t 0.8",           { 4, { K, P, M, T }, 0.8f, 40, 0.95f, 0.05f, 1, 0, seed }        },
    { "k 40, typ 0.95, p 0.95, min-p 0.05, t 0.8", { 5, { K, Y, P, M, T }, 0.8f, 40, 0.95f, 0.05f, 0.95f, 0, seed } },
    { "k 40, t 0.8",                               { 2, { K, T }, 0.8f, 40, 1, 0, 1, 0, seed }                      },
    { "k 1000, p 0.95",                            { 2, { K, P }, 1, 1000, 0.95f, 0, 1, 0, seed }                   },
    { "p 0.95",                                    { 1, { P }, 1, 0, 0.95f, 0, 1, 0, seed }                         },
    { "p 0.95, min-p 0.05, t 0.8",                 { 3, { P, M, T }, 0.8f, 0, 0.95f, 0.05f, 1, 0, seed }            },
    { "min-p 0.05, t 0.8",                         { 2, { M, T }, 0.8f, 0, 1, 0.05f, 1, 0, seed }                   },
    { "typ 0.95, t 0.8",                           { 2, { Y, T }, 0.8f, 0, 1, 0, 0.95f, 0, seed }                   },
    { "t 0.8",                                     { 1, { T }, 0.8f, 0, 1, 0, 1, 0, seed }                          },
    { "t 0",                                       { 1, { T }, 0, 0, 1, 0, 1, 0, seed }                             },
};

llama_sampler * upstream_chain(const ggml_ext_sampler_params & p) {
    llama_sampler * chain = llama_sampler_chain_init(llama_sampler_chain_default_params());
    for (int32_t i = 0; i < p.n_stages; i++) {
        llama_sampler_chain_add(chain, p.stages[i] == K ? llama_sampler_init_top_k(p.top_k) :
                                       p.stages[i] == Y ? llama_sampler_init_typical(p.typical_p, p.min_keep) :
                                       p.stages[i] == P ? llama_sampler_init_top_p(p.top_p, p.min_keep) :
                                       p.stages[i] == M ? llama_sampler_init_min_p(p.min_p, p.min_keep) :
                                                          llama_sampler_init_temp(p.temperature));
    }
    llama_sampler_chain_add(chain, llama_sampler_init_dist(p.seed));
    return chain;
}

llama_token sample_array(llama_sampler * sampler, const float * logits, int32_t n_vocab,
                         std::vector<llama_token_data> & array) {
    array.resize(size_t(n_vocab));
    for (int32_t id = 0; id < n_vocab; id++) {
        array[size_t(id)] = { id, logits[id], 0.0f };
    }
    llama_token_data_array view = { array.data(), array.size(), -1, false };
    llama_sampler_apply(sampler, &view);
    return view.data[view.selected].id;
}

// Flat: normal, standard deviation 1. Peaked: a head of 20 tokens far above a normal bulk, as a language model that
// is sure of its next token has it.
std::vector<float> make_logits(int32_t n_vocab, int32_t n_rows, bool peaked) {
    std::mt19937                    generator(7);
    std::normal_distribution<float> normal(0, peaked ? 2.0f : 1.0f);
    std::vector<float>              logits(size_t(n_vocab) * size_t(n_rows));
    for (float & l : logits) {
        l = normal(generator);
    }
    for (int32_t row = 0; peaked && row < n_rows; row++) {
        for (int32_t i = 0; i < 20; i++) {
            logits[size_t(row) * size_t(n_vocab) + generator() % uint32_t(n_vocab)] = 20.0f - float(i) * 0.7f;
        }
    }
    return logits;
}

double seconds(const std::function<void()> & run) {
    const auto start = std::chrono::steady_clock::now();
    run();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double median(std::vector<double> values) {
    std::nth_element(values.begin(), values.begin() + ptrdiff_t(values.size() / 2), values.end());
    return values[values.size() / 2];
}

// Medians of microseconds per token of the three, which take turns.
void measure(const chain_case & c, int32_t n_vocab, int32_t n_rows, const std::vector<float> & logits, double * us) {
    llama_sampler *               fused = ggml_ext_sampler_fused(&c.params);
    llama_sampler *               apply = ggml_ext_sampler_fused(&c.params);
    llama_sampler *               chain = upstream_chain(c.params);
    std::vector<llama_token_data> array;
    volatile llama_token          sink;

    const auto rows = [&](const std::function<llama_token(const float *)> & sample) {
        return seconds([&] {
            for (int32_t row = 0; row < n_rows; row++) {
                sink = sample(logits.data() + size_t(row) * size_t(n_vocab));
            }
        });
    };
    std::vector<double> times[3];
    double              spent = 0;
    for (int run = 0; run < 3 || (run < 200 && spent < 0.15); run++) {
        const double t[3] = {
            rows([&](const float * l) { return sample_array(chain, l, n_vocab, array); }),
            rows([&](const float * l) { return ggml_ext_sampler_sample_logits(fused, l, n_vocab); }),
            rows([&](const float * l) { return sample_array(apply, l, n_vocab, array); }),
        };
        for (int i = 0; run > 0 && i < 3; i++) {  // the first one warms up
            times[i].push_back(t[i] / n_rows * 1e6);
            spent += t[i];
        }
    }
    (void) sink;
    for (int i = 0; i < 3; i++) {
        us[i] = median(times[i]);
    }
    llama_sampler_free(fused);
    llama_sampler_free(apply);
    llama_sampler_free(chain);
}

}  // namespace

int main(int argc, char ** argv) {
    std::printf("| chain | logits | vocabulary | batch | upstream us | logits us | ratio | apply us | ratio |\n");
    std::printf("|---|---|---:|---:|---:|---:|---:|---:|---:|\n");
    double worst[2] = { 1e9, 1e9 };
    for (const chain_case & c : cases) {
        if (argc > 1 && !std::strstr(c.name, argv[1])) {
            continue;
        }
        for (const bool peaked : { true, false }) {
            for (const int32_t n_vocab : { 32000, 128256, 151936, 256000 }) {
                const std::vector<float> logits = make_logits(n_vocab, 32, peaked);
                for (const int32_t n_rows : { 1, 32 }) {
                    double us[3];
                    measure(c, n_vocab, n_rows, logits, us);
                    std::printf("| %s | %s | %d | %d | %.1f | %.1f | %.1f | %.1f | %.1f |\n", c.name,
                                peaked ? "peaked" : "flat", n_vocab, n_rows, us[0], us[1], us[0] / us[1], us[2],
                                us[0] / us[2]);
                    std::fflush(stdout);
                    for (int i = 0; i < 2; i++) {
                        worst[i] = std::min(worst[i], us[0] / us[i + 1]);
                    }
                }
            }
        }
    }
    std::printf("smallest ratio: logits %.2f, apply %.2f\n", worst[0], worst[1]);
    return 0;
}
