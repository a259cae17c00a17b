// The kept set and the probabilities against the reference, on every path that this processor has. Breaks with a wrong
// tie, a cut that is off by one, a bucket that is left out, a stage in the wrong order, paths that differ in a bit.

#include "check.h"
#include "sampler_cases.h"

#include <cstring>

namespace {

using namespace ggml_ext_sampling;

std::vector<const kernels *> paths() {
    std::vector<const kernels *> result = { &kernels_generic() };
    for (const kernels * k : { kernels_avx2(), kernels_avx512() }) {
        if (k) {
            result.push_back(k);
        }
    }
    return result;
}

void test_cases(const std::vector<sampler_case> & cases) {
    for (const sampler_case & c : cases) {
        const auto expected = sampler_reference::kept(c.logits, c.params);
        for (const kernels * k : paths()) {
            const std::string problem = kept_problem<rules>(*k, c, expected);
            CHECK(problem.empty(), "%s, %s: %s", c.name.c_str(), k->name, problem.c_str());
        }
    }
}

// Random settings of all stages on vocabularies around the sizes at which the selection changes its way.
void test_random() {
    std::mt19937 generator(11);
    const auto   uniform = [&](float from, float to) {
        return std::uniform_real_distribution<float>(from, to)(generator);
    };
    std::vector<sampler_case> cases;
    for (const int32_t n : { 1023, 1024, 1025, 2047, 5000, 20000 }) {
        for (int i = 0; i < 12; i++) {
            const float        deviation = std::exp(uniform(-3, 3));
            std::vector<float> logits(static_cast<size_t>(n));
            for (float & l : logits) {
                l = std::normal_distribution<float>(0, deviation)(generator);
            }
            ggml_ext_sampler_params params = no_stages();
            std::vector<int32_t>    stages = { TOP_K, TYPICAL, TOP_P, MIN_P, TEMPERATURE };
            std::shuffle(stages.begin(), stages.end(), generator);
            params.n_stages = 1 + int32_t(generator() % 5);
            std::copy(stages.begin(), stages.begin() + params.n_stages, params.stages);
            params.temperature = uniform(0.2f, 2);
            params.top_k       = int32_t(generator() % uint32_t(n)) + 1;
            params.top_p       = uniform(0.05f, 1);
            params.typical_p   = uniform(0.05f, 1);
            params.min_p       = uniform(0, 0.2f);
            params.min_keep    = i % 3 ? 0 : generator() % 2000;
            cases.push_back({ "random " + std::to_string(n) + " " + std::to_string(i), logits, params });
        }
    }
    test_cases(cases);
}

// A real vocabulary: flat, and peaked so that top-p ends in the head.
void test_large() {
    std::vector<sampler_case> cases;
    for (const bool peaked : { false, true }) {
        std::mt19937                    generator(3);
        std::normal_distribution<float> normal(0, 1);
        std::vector<float>              logits(151936);
        for (size_t i = 0; i < logits.size(); i++) {
            logits[i] = normal(generator) + (peaked && i % 5000 == 17 ? 15.0f : 0.0f);
        }
        ggml_ext_sampler_params all = with_stages({ TOP_K, TYPICAL, TOP_P, MIN_P, TEMPERATURE });
        all.top_k                   = 40;
        all.typical_p               = 0.9f;
        all.top_p                   = 0.95f;
        all.min_p                   = 0.05f;
        all.temperature             = 0.8f;
        for (const auto & params :
             { with_top_p(0.95f), with_top_p(0.5f), with_typical(0.95f), with_top_k(1000), with_min_p(0.05f), all }) {
            cases.push_back({ peaked ? "large, peaked" : "large, flat", logits, params });
        }
    }
    test_cases(cases);
}

// Every loop of a path gives the bits of plain C++, at every length and for every kind of value.
void test_paths() {
    const kernels &                       plain = kernels_generic();
    std::mt19937                          generator(5);
    std::uniform_real_distribution<float> uniform(-800, 0);
    for (const kernels * k : paths()) {
        for (int n = 1; n <= block_size; n++) {
            std::vector<float> l(static_cast<size_t>(n));
            for (float & x : l) {
                x = uniform(generator);
            }
            l[generator() % l.size()] = n % 3 ? 0.0f : -INFINITY;
            const scale        s      = { 0.0, n % 2 ? 1.0 : 1.25 };
            std::vector<float> low(2), high(2);
            const bool         numbers[2] = { plain.range(l.data(), n, &low[0], &high[0]),
                                              k->range(l.data(), n, &low[1], &high[1]) };
            CHECK(numbers[0] && numbers[1] && low[0] == low[1] && high[0] == high[1], "%s, %d: range", k->name, n);

            std::vector<double> w(block_size), v(block_size);
            const double sums[2] = { plain.weights(l.data(), n, s, w.data()), k->weights(l.data(), n, s, v.data()) };
            CHECK(std::memcmp(&sums[0], &sums[1], sizeof(double)) == 0 && w == v, "%s, %d: weights", k->name, n);

            std::vector<uint16_t> b(block_size), d(block_size);
            const bucketing       into = { -100.5, 1.5, 1024 };
            plain.buckets(l.data(), n, s, into, b.data());
            k->buckets(l.data(), n, s, into, d.data());
            CHECK(b == d, "%s, %d: buckets", k->name, n);

            std::vector<float>   out[2] = { std::vector<float>(block_size + compact_slack), l };
            std::vector<int32_t> ids[2] = { std::vector<int32_t>(block_size + compact_slack),
                                            std::vector<int32_t>(block_size + compact_slack) };
            out[1].resize(block_size + compact_slack);
            for (int i = 0; i < n; i++) {
                ids[1][size_t(i)] = 1000 + i;
            }
            // In place with ids on the tested path, out of place without on the other.
            const int counts[2] = { plain.compact(l.data(), nullptr, 1000, n, -300, out[0].data(), ids[0].data()),
                                    k->compact(out[1].data(), ids[1].data(), 0, n, -300, out[1].data(),
                                               ids[1].data()) };
            CHECK(counts[0] == counts[1] && std::equal(&out[0][0], &out[0][0] + counts[0], &out[1][0]) &&
                      std::equal(&ids[0][0], &ids[0][0] + counts[0], &ids[1][0]),
                  "%s, %d: compact", k->name, n);

            std::vector<int32_t> words;
            for (int i = 0; i < n; i++) {
                int32_t bits;
                std::memcpy(&bits, &l[size_t(i)], sizeof(bits));
                words.insert(words.end(), { 77 + i, bits, -1 });
            }
            std::vector<float> read(static_cast<size_t>(n));
            CHECK(k->unpack(words.data(), 77, n, read.data()) && read == l, "%s, %d: unpack", k->name, n);
            words[3 * (generator() % size_t(n))] += 1;
            CHECK(!k->unpack(words.data(), 77, n, read.data()) && read == l, "%s, %d: other ids", k->name, n);

            l[generator() % l.size()] = NAN;
            CHECK(!k->range(l.data(), n, &low[1], &high[1]), "%s, %d: NaN", k->name, n);
        }
    }
}

// exp against libm's long double: within 1e-15 of it down to its cut.
void test_exp() {
    const scale s = { 0.0, 1.0 };
    for (float x = 0; x > -699; x -= 0.37f) {
        double            w;
        const long double exact = std::exp((long double) x);
        kernels_generic().weights(&x, 1, s, &w);
        CHECK(std::fabs(w - exact) <= 1e-15L * exact, "exp(%g) is %.17g", double(x), w);
    }
}

}  // namespace

int main() {
    for (const int32_t n : { 1, 2, 5, 300, 1500 }) {
        test_cases(sampler_cases(n));
    }
    test_random();
    test_large();
    test_paths();
    test_exp();
    return check_done();
}
