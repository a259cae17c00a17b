// The CUDA kernel of GGML_EXT_OP_SAMPLE in the emulator: the same tokens as the CPU op, bit for bit, with any number of
// threads. Uniform numbers lie on the steps of the reference's distribution, so a cut that is off by one candidate, a
// candidate that a pass skips or takes twice, or a bucket at the wrong end changes a token. Some rows fill a bucket of
// the first histogram, which makes the search go through several windows.

#include "check.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include "sample/sample.cuh"
#include "sample_cases.h"

#include <algorithm>
#include <cstring>

namespace {

using namespace ggml_ext;

#ifdef __SANITIZE_ADDRESS__
constexpr int n_uniforms = 1;
#else
constexpr int n_uniforms = 2;
#endif

// Rows with a float before and behind them that would make them wrong, at all offsets in 16 bytes.
struct problem {
    int64_t                             n, stride;
    std::vector<float>                  logits;
    std::vector<int32_t>                ids;  // of the same strides
    std::vector<ggml_ext_sample_params> params;

    explicit problem(int64_t n) : n(n), stride(n + 1 + (n % 2)) {}

    void add(const std::vector<float> & row, const ggml_ext_sample_params & p) {
        logits.insert(logits.end(), row.begin(), row.end());
        logits.insert(logits.end(), size_t(stride - n), NAN);
        for (int64_t i = 0; i < stride; i++) {
            ids.push_back(int32_t(5 * i + 2));
        }
        params.push_back(p);
    }
};

std::vector<int32_t> on_cpu(const problem & p) {
    const int64_t          n_rows = int64_t(p.params.size());
    const ggml_init_params memory = { p.logits.size() * 8 + size_t(p.n) * 64 + (1 << 21), nullptr, false };
    ggml_context *         ctx    = ggml_init(memory);
    ggml_tensor *          whole  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, p.stride, n_rows);
    ggml_tensor *          params = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, GGML_EXT_SAMPLE_WORDS, n_rows);
    ggml_tensor *          ids    = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, p.stride, n_rows);
    std::memcpy(ids->data, p.ids.data(), p.ids.size() * 4);
    std::memcpy(whole->data, p.logits.data(), p.logits.size() * 4);
    std::memcpy(params->data, p.params.data(), p.params.size() * sizeof(p.params[0]));
    ggml_tensor * token = ggml_ext_sample(ctx, ggml_view_2d(ctx, whole, p.n, n_rows, whole->nb[1], 0), params,
                                          ggml_view_2d(ctx, ids, p.n, n_rows, ids->nb[1], 0));
    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, token);
    CHECK(ggml_graph_compute_with_ctx(ctx, graph, 2) == GGML_STATUS_SUCCESS, "status");
    const int32_t *      tokens = (const int32_t *) token->data;
    std::vector<int32_t> result(tokens, tokens + n_rows);
    ggml_free(ctx);
    return result;
}

void check(const problem & p, int n_threads, const std::string & name) {
    static uint32_t            seed     = 1;
    const std::vector<int32_t> expected = on_cpu(p);
    std::vector<int32_t>       tokens(expected.size(), -77);
    for (size_t first = 0; first < tokens.size(); first += sample_rows) {
        const size_t n = std::min(tokens.size() - first, size_t(sample_rows));
        sample_batch batch;
        batch.n_vocab = int32_t(p.n);
        for (size_t i = 0; i < n; i++) {
            const size_t row = first + i;
            batch.rows[i]    = { p.logits.data() + row * size_t(p.stride), (const int32_t *) &p.params[row],
                              row % 3 ? p.ids.data() + row * size_t(p.stride) : nullptr, &tokens[row] };
        }
        ggml_ext_emulator::seed(seed++);
        ggml_ext_cuda_launch(ggml_ext_sample_kernel, dim3(unsigned(n)), dim3(unsigned(n_threads)), 0, nullptr, batch);
    }
    for (size_t row = 0; row < tokens.size(); row++) {
        if (row % 3 == 0 && tokens[row] >= 0) {
            tokens[row] = 5 * tokens[row] + 2;
        }
        const ggml_ext_sample_params & q = p.params[row];
        CHECK(tokens[row] == expected[row],
              "%s, %d tokens, %d threads, row %zu: %d, not %d (k %d, p %g, min-p %g, t %g)", name.c_str(), int(p.n),
              n_threads, row, tokens[row], expected[row], q.top_k, double(q.top_p), std::exp(q.log_min_p),
              double(q.temperature));
    }
}

// Uniform numbers on both sides of some steps of the distribution, as the op's integers round them.
std::vector<uint64_t> uniforms(const std::vector<float> & logits, const ggml_ext_sampler_params & params,
                               std::mt19937_64 & random) {
    const std::vector<reference_token> kept = sampler_reference::kept(logits, params);
    std::vector<uint64_t>              all  = { random() % 2 ? 0 : UINT64_MAX };
    while (!kept.empty() && all.size() < size_t(n_uniforms)) {
        long double  sum = 0;
        const size_t at  = random() % kept.size();
        for (size_t i = 0; i <= at; i++) {
            sum += kept[i].p;
        }
        all.push_back(uint64_t(std::min(sum * (1 + (random() % 2 ? 1e-6L : -1e-6L)), 1.0L - 0x1p-64L) * 0x1p64L));
    }
    return all;
}

void check_all(int64_t n, int n_threads) {
    std::mt19937_64 random(uint64_t(n) + 5);
    for (const sample_logits & logits : sample_vocabularies(int32_t(n))) {
        problem p(n);
        for (const ggml_ext_sampler_params & params : sample_settings()) {
            for (const uint64_t uniform : uniforms(logits.values, params, random)) {
                p.add(logits.values, sample_numbers(params, uniform));
            }
        }
        check(p, n_threads, logits.name);
    }
}

// More equal or nearly equal logits than the list has places, with the cut among them.
void check_full_buckets(int64_t n, int n_threads) {
    std::mt19937_64    random(9);
    std::vector<float> equal(size_t(n), 4.0f), near(static_cast<size_t>(n));
    for (size_t i = 0; i < near.size(); i++) {
        near[i]  = 1.0f + float(random() % 4096) * 0x1p-23f;
        equal[i] = i % 997 == 3 ? 5.0f : equal[i];
    }
    near[1] = 9.0f;
    near[2] = -20.0f;
    for (const std::vector<float> & logits : { equal, near }) {
        problem p(n);
        for (const int32_t k : { 0, 3, int(n) / 2, int(n) - 1 }) {
            p.add(logits, sample_numbers(sample_stages(k, 1.0f, 0.0f, 0, 1.0f), random()));
            p.add(logits, sample_numbers(sample_stages(k, 0.37f, 0.0f, int(n) / 5, 1.0f), UINT64_MAX));
            p.add(logits, sample_numbers(sample_stages(k, 0.5f, 0.1f, 0, 1.0f), random()));
        }
        check(p, n_threads, "full buckets");
    }
}

// Equal logits with the cut at the last place of a window: windows of 2^14 ids are the last that are split.
void check_window_end() {
    const int32_t size = 1 << 14;
    problem       p(size + 6);
    for (const int32_t k : { size - 1, size, size + 1 }) {
        p.add(std::vector<float>(size_t(p.n), 4.0f), sample_numbers(sample_stages(k, 1.0f, 0.0f, 0, 1.0f), UINT64_MAX));
    }
    check(p, 64, "window's end");
}

void check_refused() {
    problem p(301);
    for (const float wrong : { NAN, -NAN, INFINITY, 1.0f }) {
        for (const size_t place : { 0, 150, 300 }) {
            std::vector<float> logits(301, 1.0f);
            logits[place] = wrong;
            p.add(logits, sample_numbers(sample_stages(40, 0.9f, 0.05f, 0, 1.0f), 1));
        }
    }
    p.add(std::vector<float>(301, -INFINITY), sample_numbers(sample_stages(40, 0.9f, 0.05f, 0, 1.0f), 1));
    check(p, 64, "refused");
}

}  // namespace

int main() {
    check_all(1, 32);
    check_all(2, 128);
    check_all(333, 64);
    check_all(1501, 32);
    check_all(4099, 32);
    check_full_buckets(5003, 32);
    check_full_buckets(9001, sample_max_threads);
    check_window_end();
    check_refused();
    return check_done();
}
