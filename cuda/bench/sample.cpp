// Sampling with top-p 0.95 from 152k logits: the fused op against the graph that llama.cpp's own backend samplers top_p
// and dist build (src/llama-sampler.cpp), op by op. One token has more than half of the mass, the rest is broad.

#include "bench.h"
#include "hooks/ggml-ext-hooks.h"

#include <algorithm>

namespace ggml_ext_bench {

namespace {

constexpr float top_p = 0.95f;

contender fused(int64_t n_vocab, int64_t n_rows) {
    contender c;
    c.name  = "fused";
    c.bytes = 4.0 * n_vocab * n_rows;
    c.ops   = 0.0;
    c.n     = n_rows;
    c.build = [=](ggml_context * ctx, int64_t rows) {
        ggml_tensor * logits = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_vocab, rows);
        ggml_tensor * params = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, GGML_EXT_SAMPLE_WORDS, rows);
        ggml_set_name(logits, "logits");
        ggml_set_name(params, "sample_parameters");
        return ggml_ext_sample(ctx, logits, params, nullptr);
    };
    return c;
}

ggml_tensor * as_column(ggml_context * ctx, ggml_tensor * row) {
    return ggml_reshape_2d(ctx, row, 1, ggml_nelements(row));
}

// Logits in descending order, -Inf behind the cut; *ids: their tokens.
ggml_tensor * upstream_top_p(ggml_context * ctx, ggml_tensor * logits, ggml_tensor ** ids) {
    const int64_t n      = logits->ne[0];
    *ids                 = ggml_argsort(ctx, logits, GGML_SORT_ORDER_DESC);
    ggml_tensor * sorted = ggml_reshape_1d(ctx, ggml_get_rows(ctx, as_column(ctx, logits), *ids), n);
    ggml_tensor * sums   = ggml_cumsum(ctx, ggml_soft_max(ctx, sorted));
    ggml_tensor * mask   = ggml_step(ctx, ggml_scale_bias(ctx, sums, -1.0f, top_p));
    ggml_tensor * last   = ggml_clamp(ctx, ggml_sum(ctx, mask), 0.0f, float(n - 1));
    ggml_tensor * one    = ggml_scale_bias(ctx, last, 0.0f, 1.0f);
    mask                 = ggml_set_rows(ctx, as_column(ctx, mask), one, ggml_cast(ctx, last, GGML_TYPE_I32));
    return ggml_add(ctx, sorted, ggml_log(ctx, ggml_reshape_1d(ctx, mask, n)));
}

ggml_tensor * upstream_dist(ggml_context * ctx, ggml_tensor * logits, ggml_tensor * ids) {
    ggml_tensor * uniform = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 1);
    ggml_set_name(uniform, "uniform");
    const float   n     = float(logits->ne[0]);
    ggml_tensor * above = ggml_step(ctx, ggml_sub(ctx, ggml_cumsum(ctx, ggml_soft_max(ctx, logits)), uniform));
    ggml_tensor * count = ggml_clamp(ctx, ggml_sum(ctx, above), 1.0f, n);
    ggml_tensor * place = ggml_cast(ctx, ggml_scale_bias(ctx, count, -1.0f, n), GGML_TYPE_I32);
    return ggml_get_rows(ctx, as_column(ctx, ids), place);
}

// One row: llama.cpp builds such a graph for each sequence.
contender upstream(int64_t n_vocab) {
    contender c = fused(n_vocab, 1);
    c.name      = "top_p, dist";
    c.build     = [=](ggml_context * ctx, int64_t) {
        ggml_tensor * logits = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_vocab);
        ggml_set_name(logits, "logits");
        ggml_tensor * ids;
        ggml_tensor * kept = upstream_top_p(ctx, logits, &ids);
        return upstream_dist(ctx, kept, ids);
    };
    return c;
}

void run_sample(const options & options, int scale) {
    const int64_t n_vocab = 151936 / scale;
    for (int64_t n_rows : { 1, 32 }) {
        std::vector<contender> contenders = { fused(n_vocab, n_rows), upstream(n_vocab) };
        std::vector<figures>   found      = measure(options, contenders, 0.0);
        for (double & seconds : found[1].seconds) {  // its rows run one after the other
            seconds *= double(n_rows);
        }
        contenders[1].bytes = contenders[0].bytes;
        report("sample", "n_vocab=151936 n=" + std::to_string(n_rows), contenders, found);
    }
}

}  // namespace

const part sample = { "sample", run_sample };

}  // namespace ggml_ext_bench
