// GGML_EXT_OP_SAMPLE on the CPU. The uniform number is an input, so the whole distribution is seen: it is swept closely
// around every step of the reference's cumulative distribution (long double, full sorts). A cut that is off by one
// token, a wrong order of ties, a wrong temperature or a wrong order of the stages moves a step.

#include "check.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include "sample/sample_math.h"
#include "sample_cases.h"

#include <algorithm>
#include <cstring>

namespace {

int32_t name_of(int32_t place) {
    return 7 * place + 3;
}

// Rows have the same logits; each has its parameters. Rows are not adjacent.
std::vector<int32_t> sample(const std::vector<float> & logits, const std::vector<ggml_ext_sample_params> & rows,
                            int n_threads, bool named = false) {
    const int64_t          n = int64_t(logits.size()), n_rows = int64_t(rows.size());
    const ggml_init_params memory = { size_t((n + 1) * n_rows * 8) + size_t(n) * 128 + (1 << 21), nullptr, false };
    ggml_context *         ctx    = ggml_init(memory);
    ggml_tensor *          whole  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n + 1, n_rows);
    ggml_tensor *          params = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, GGML_EXT_SAMPLE_WORDS, n_rows);
    for (int64_t row = 0; row < n_rows; row++) {
        float * to = (float *) whole->data + row * (n + 1);
        std::copy(logits.begin(), logits.end(), to);
        to[n] = NAN;  // behind each row; -1 if it is read
    }
    ggml_tensor * ids = named ? ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n, n_rows) : nullptr;
    for (int64_t i = 0; named && i < n * n_rows; i++) {
        ((int32_t *) ids->data)[i] = name_of(int32_t(i % n));
    }
    std::memcpy(params->data, rows.data(), rows.size() * sizeof(rows[0]));
    ggml_tensor * token = ggml_ext_sample(ctx, ggml_view_2d(ctx, whole, n, n_rows, whole->nb[1], 0), params, ids);
    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, token);
    CHECK(ggml_graph_compute_with_ctx(ctx, graph, n_threads) == GGML_STATUS_SUCCESS, "status");
    const int32_t *      tokens = (const int32_t *) token->data;
    std::vector<int32_t> result(tokens, tokens + n_rows);
    ggml_free(ctx);
    return result;
}

uint64_t units(long double u) {
    return u <= 0 ? 0 : u >= 1 ? UINT64_MAX : uint64_t(u * 0x1p64L);
}

// Relative errors of masses, of logits up to 30 below the largest, and what their sums make of a step's place.
constexpr long double tolerance = 5e-6L;

bool agrees(const std::vector<reference_token> & expected, const std::vector<long double> & us,
            const std::vector<int32_t> & tokens) {
    for (size_t i = 0; i < us.size(); i++) {
        long double from = 0;
        bool        fits = expected.empty() && tokens[i] == -1;
        for (const reference_token & t : expected) {
            fits |= t.id == tokens[i] && us[i] > from - tolerance && us[i] < from + t.p + tolerance;
            from += t.p;
        }
        if (!fits) {
            return false;
        }
    }
    return true;
}

void check_distribution(const sample_logits & logits, const ggml_ext_sampler_params & params, int n_threads) {
    const std::vector<reference_token> expected = sampler_reference::kept(logits.values, params);
    std::vector<long double>           us       = { 0, 1 };
    long double                        sum      = 0;
    for (const reference_token & t : expected) {
        sum += t.p;
        if (us.size() < 200) {
            us.push_back(sum - 2 * tolerance);
            us.push_back(sum + 2 * tolerance);
        }
    }
    for (int i = 1; i < 40; i++) {
        us.push_back(i / 40.0L);
    }
    us.erase(std::remove_if(us.begin(), us.end(), [](long double u) { return u < 0 || u > 1; }), us.end());
    std::vector<ggml_ext_sample_params> rows;
    for (const long double u : us) {
        rows.push_back(sample_numbers(params, units(u)));
    }
    const std::vector<int32_t> tokens = sample(logits.values, rows, n_threads);
    bool                       right  = agrees(expected, us, tokens);
    for (const float factor : { 1 - 2e-6f, 1 + 2e-6f }) {  // the cut may fall on either side of a tie of rounded sums
        ggml_ext_sampler_params near = params;
        near.top_p *= factor;
        right = right || (params.top_p < 1 && agrees(sampler_reference::kept(logits.values, near), us, tokens));
    }
    CHECK(right, "%s, %zu tokens: k %d, p %g, min-p %g, keep %zu, t %g", logits.name.c_str(), logits.values.size(),
          params.top_k, double(params.top_p), double(params.min_p), params.min_keep, double(params.temperature));
}

// The least uniform number that is not below i of n, modulo 2^64.
uint64_t step(int i, int n) {
    return uint64_t((((unsigned __int128) i << 64) + unsigned(n) - 1) / unsigned(n));
}

// Equal logits have equal masses, so top-p is exact there: p n tokens, those with the lowest ids.
void check_ties() {
    const std::vector<float> logits(1024, 2.25f);
    for (const int kept : { 1, 2, 511, 512, 1023 }) {
        const float                         p      = float(kept) / 1024;
        const ggml_ext_sampler_params       params = sample_stages(0, p, 0.0f, 0, 0.7f);
        std::vector<ggml_ext_sample_params> rows;
        for (int i = 0; i < kept; i++) {  // the first and the last uniform number of each token
            rows.push_back(sample_numbers(params, step(i, kept)));
            rows.push_back(sample_numbers(params, step(i + 1, kept) - 1));
        }
        const std::vector<int32_t> tokens = sample(logits, rows, 2);
        for (int i = 0; i < 2 * kept; i++) {
            CHECK(tokens[size_t(i)] == i / 2, "%d kept, token %d at %d", kept, tokens[size_t(i)], i);
        }
    }
}

// The bound of docs/sampling.md for x as it is, and both ends of the range.
void check_masses() {
    for (float x = 0; x > -30; x -= 1e-4f) {
        const long double w     = std::exp((long double) x) * 0x1p40L;
        const long double error = std::fabs((long double) ggml_ext_sample_mass(x) - w);
        CHECK(error <= 4 * 0x1p-24L * w + 1, "x = %g: %Lg of %Lg", double(x), error, w);
    }
    CHECK(ggml_ext_sample_mass(0) == uint64_t(1) << 40, "the largest");
    CHECK(ggml_ext_sample_mass(-INFINITY) == 0 && ggml_ext_sample_mass(-1e30f) == 0, "far below");
}

void check_refused() {
    const ggml_ext_sampler_params params = sample_stages(40, 0.9f, 0.05f, 0, 1.0f);
    for (const float wrong : { NAN, -NAN, INFINITY }) {
        for (const size_t place : { size_t(0), size_t(50), size_t(98) }) {
            std::vector<float> logits(99, 1.0f);
            logits[place] = wrong;
            CHECK(sample(logits, { sample_numbers(params, 5) }, 1)[0] == -1, "%g at %zu", double(wrong), place);
        }
    }
    CHECK(sample(std::vector<float>(99, -INFINITY), { sample_numbers(params, 5) }, 1)[0] == -1, "nothing finite");
}

// Ids name the places and change nothing else; what is no token has none.
void check_ids() {
    for (const sample_logits & logits : sample_vocabularies(333)) {
        std::vector<ggml_ext_sample_params> rows;
        for (const ggml_ext_sampler_params & params : sample_settings()) {
            rows.push_back(sample_numbers(params, UINT64_MAX / 3));
        }
        const std::vector<int32_t> places = sample(logits.values, rows, 1),
                                   names  = sample(logits.values, rows, 1, true);
        for (size_t i = 0; i < rows.size(); i++) {
            CHECK(names[i] == name_of(places[i]), "%s: %d at %d", logits.name.c_str(), names[i], places[i]);
        }
    }
    CHECK(sample({ NAN, 1 }, { sample_numbers(sample_settings()[0], 5) }, 1, true)[0] == -1, "an id for no token");
}

}  // namespace

int main() {
    int n_threads = 1;
    for (const int32_t n : { 1, 2, 13, 333, 1500 }) {
        for (const sample_logits & logits : sample_vocabularies(n)) {
            for (const ggml_ext_sampler_params & params : sample_settings()) {
                check_distribution(logits, params, n_threads);
                n_threads = n_threads % 4 + 1;
            }
        }
    }
    check_masses();
    check_ties();
    check_refused();
    check_ids();
    return check_done();
}
