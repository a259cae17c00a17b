// The fused sampler's callbacks of backend sampling, on the CPU backend without a model: a graph as llama.cpp builds
// it, with a sampler and a row of logits per sequence. Its tokens are those that the same samplers draw on the
// processor from the same seeds. A stage that does not reach the op, parameters or random numbers of another sequence,
// or a random number more or less per token would change them.

#include "check.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"
#include "ggml-ext.h"
#include "llama.h"
#include "sample_cases.h"

#include <cstring>
#include <memory>
#include <string>

namespace {

struct free_sampler {
    void operator()(llama_sampler * sampler) const { llama_sampler_free(sampler); }
};

using sampler_ptr = std::unique_ptr<llama_sampler, free_sampler>;

sampler_ptr make(ggml_ext_sampler_params params, uint32_t seed) {
    params.seed = seed;
    return sampler_ptr(ggml_ext_sampler_fused(&params));
}

bool offered(const sampler_ptr & sampler, uint32_t n_outputs = 1) {
    return sampler->iface->backend_init(sampler.get(), ggml_backend_cpu_buffer_type(), n_outputs);
}

// Runs the samplers together, each on its row; candidates, where given, are what the rows' places stand for.
class graph {
  public:
    graph(const std::vector<sampler_ptr> & samplers, int64_t n_vocab, bool candidates) :
        samplers(samplers), n_vocab(n_vocab), backend(ggml_backend_cpu_init()),
        ctx(ggml_init({ 64 * samplers.size() * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true })) {
        nodes  = ggml_new_graph(ctx.get());
        logits = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_vocab, int64_t(samplers.size()));
        ids    = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, n_vocab);
        for (size_t i = 0; i < samplers.size(); i++) {
            llama_sampler_data data = {};
            data.logits             = ggml_view_1d(ctx.get(), logits, n_vocab, i * logits->nb[1]);
            data.candidates         = candidates ? ids : nullptr;
            samplers[i]->iface->backend_apply(samplers[i].get(), ctx.get(), nodes, &data);
            CHECK(data.sampled && ggml_nelements(data.logits) == 1 && !data.probs && !data.candidates,
                  "only the token and one logit leave the device");
            ggml_build_forward_expand(nodes, data.sampled);
            tokens.push_back(data.sampled);
        }
        buffer.reset(ggml_backend_alloc_ctx_tensors(ctx.get(), backend.get()));
        std::vector<int32_t> places;
        for (int32_t i = 0; i < n_vocab; i++) {
            places.push_back(1000 + i);
        }
        ggml_backend_tensor_set(ids, places.data(), 0, places.size() * 4);
    }

    std::vector<int32_t> run(const std::vector<std::vector<float>> & rows) {
        for (size_t i = 0; i < samplers.size(); i++) {
            ggml_backend_tensor_set(logits, rows[i].data(), i * logits->nb[1], size_t(n_vocab) * 4);
            samplers[i]->iface->backend_set_input(samplers[i].get());
        }
        CHECK(ggml_backend_graph_compute(backend.get(), nodes) == GGML_STATUS_SUCCESS, "status");
        std::vector<int32_t> result(tokens.size());
        for (size_t i = 0; i < tokens.size(); i++) {
            ggml_backend_tensor_get(tokens[i], &result[i], 0, 4);
        }
        return result;
    }

  private:
    const std::vector<sampler_ptr> & samplers;
    int64_t                          n_vocab;
    ggml_backend_ptr                 backend;
    ggml_context_ptr                 ctx;
    ggml_backend_buffer_ptr          buffer;
    ggml_cgraph *                    nodes;
    ggml_tensor *                    logits;
    ggml_tensor *                    ids;
    std::vector<ggml_tensor *>       tokens;
};

std::vector<std::vector<float>> rows_at(int step, size_t n_rows, int32_t n_vocab) {
    std::vector<std::vector<float>> rows;
    for (size_t i = 0; i < n_rows; i++) {
        std::mt19937                    random(uint32_t(step) * 100 + uint32_t(i));
        std::normal_distribution<float> normal(0, i % 2 ? 3.0f : 1.0f);
        rows.emplace_back(size_t(n_vocab));
        for (float & logit : rows.back()) {
            logit = normal(random);
        }
    }
    return rows;
}

std::vector<ggml_ext_sampler_params> settings() {
    std::vector<ggml_ext_sampler_params> all = sample_settings();
    ggml_ext_sampler_params              p   = {};  // nothing but a draw, whatever the values say
    p.temperature                            = 0.3f;
    p.top_k                                  = 2;
    p.top_p                                  = 0.1f;
    p.min_p                                  = 0.9f;
    p.typical_p                              = 0.1f;
    all.push_back(p);
    for (const int32_t stage :
         { GGML_EXT_SAMPLER_TOP_K, GGML_EXT_SAMPLER_TOP_P, GGML_EXT_SAMPLER_MIN_P, GGML_EXT_SAMPLER_TEMPERATURE }) {
        p.n_stages  = 1;
        p.stages[0] = stage;
        all.push_back(p);
    }
    return all;
}

void check_tokens(bool candidates) {
    const int32_t                              n_vocab = 777;
    const std::vector<ggml_ext_sampler_params> all     = settings();
    std::vector<sampler_ptr>                   on_backend, on_processor;
    for (size_t i = 0; i < all.size(); i++) {
        on_backend.push_back(make(all[i], uint32_t(i) + 1));
        on_processor.push_back(make(all[i], uint32_t(i) + 1));
        CHECK(offered(on_backend.back()), "setting %zu", i);
    }
    graph                g(on_backend, n_vocab, candidates);
    std::vector<int32_t> first;
    for (int step = 0; step < 50; step++) {
        const auto                 rows   = rows_at(step, all.size(), n_vocab);
        const std::vector<int32_t> tokens = g.run(rows);
        for (size_t i = 0; i < all.size(); i++) {
            const int32_t expected = ggml_ext_sampler_sample_logits(on_processor[i].get(), rows[i].data(), n_vocab);
            CHECK(tokens[i] == expected + (candidates ? 1000 : 0), "step %d, setting %zu: %d, not %d", step, i,
                  tokens[i], expected);
        }
        first = step == 0 ? tokens : first;
    }
    for (const sampler_ptr & sampler : on_backend) {
        llama_sampler_reset(sampler.get());
    }
    CHECK(g.run(rows_at(0, all.size(), n_vocab)) == first, "reset starts the seeds again");
}

// As llama.cpp does for one that has a sampler's graph: the random numbers move, the graph's inputs stay.
void check_copy() {
    const ggml_ext_sampler_params params = sample_stages(0, 1.0f, 0.0f, 0, 1.0f);
    std::vector<sampler_ptr>      source, target;
    source.push_back(make(params, 3));
    target.push_back(make(params, 4));
    graph      from(source, 400, false), to(target, 400, false);
    const auto rows = rows_at(1, 1, 400);
    from.run(rows);
    llama_sampler_copy(source[0].get(), target[0].get());
    for (int step = 0; step < 20; step++) {
        CHECK(from.run(rows) == to.run(rows), "step %d", step);
    }
}

void check_nothing() {
    std::vector<sampler_ptr> samplers;
    samplers.push_back(make(sample_settings()[1], 3));
    graph g(samplers, 10, false);
    CHECK(g.run({ std::vector<float>(10, NAN) })[0] == LLAMA_TOKEN_NULL, "NaN");
}

void check_offers() {
    ggml_ext_sampler_params params = sample_stages(0, 0.9f, 0.0f, 0, 1.0f);
    CHECK(offered(make(params, 1)), "the usual order");
    CHECK(!offered(make(params, 1), 2), "two outputs of a sequence");
    std::swap(params.stages[0], params.stages[3]);
    CHECK(!offered(make(params, 1)), "temperature first");
    params.n_stages  = 2;
    params.stages[0] = GGML_EXT_SAMPLER_TYPICAL;
    params.stages[1] = GGML_EXT_SAMPLER_TEMPERATURE;
    CHECK(offered(make(params, 1)), "typical, off");
    params.typical_p = 0.9f;
    CHECK(!offered(make(params, 1)), "typical");
}

}  // namespace

int main() {
    check_tokens(false);
    check_tokens(true);
    check_copy();
    check_nothing();
    check_offers();
    return check_done();
}
