// The distribution of the draws: 100 configurations of 1e6 draws each of the prepared selection, and whole samplings
// through the library. Breaks if a token's probability is off by more than some 1e-3 of itself, if the draw does not
// cover the mass or a token without probability comes out.

#include "check.h"
#include "llama.h"
#include "sampler_draws.h"

namespace {

using namespace ggml_ext_sampling;

void test_statistics() {
    // Tables: the 5 % point of chi-square with 1 and with 100 degrees of freedom.
    CHECK(std::fabs(chi_square_tail(3.841459, 1) - 0.05) < 1e-7, "%g", chi_square_tail(3.841459, 1));
    CHECK(std::fabs(chi_square_tail(124.342113, 100) - 0.05) < 1e-7, "%g", chi_square_tail(124.342113, 100));
    CHECK(std::fabs(chi_square_tail(77.929465, 100) - 0.95) < 1e-7, "%g", chi_square_tail(77.929465, 100));
    CHECK(std::fabs(kolmogorov_smirnov({ 0.1, 0.2, 0.3, 0.4 }) - 1.2) < 1e-12, "distance 0.6, four values");
}

void test_sweep() {
    for (const int32_t n : { 1, 2, 300 }) {
        for (const sampler_case & c : sampler_cases(n)) {
            const std::string problem = sweep_problem<rules>(c);
            CHECK(problem.empty(), "%s: %s", c.name.c_str(), problem.c_str());
        }
    }
}

void check_p_values(const char * name, const std::vector<double> & values) {
    for (size_t i = 0; i < values.size(); i++) {
        CHECK(values[i] > 1e-6, "%s, configuration %zu: p-value %g", name, i, values[i]);
    }
    const double distance = kolmogorov_smirnov(values);
    std::printf("%s: %zu p-values, Kolmogorov-Smirnov %.2f\n", name, values.size(), distance);
    CHECK(distance < kolmogorov_smirnov_limit, "%s: the p-values are not uniform", name);
}

void test_prepared() {
    check_p_values("draws", draw_p_values<rules>(100, draws_per_case));
}

// As a program samples: every draw selects anew.
void test_whole() {
    std::vector<double> values;
    for (uint32_t i = 200; i < 500; i += 10) {  // small vocabularies: see draw_case
        sampler_case c               = draw_case(i);
        c.params.seed                = i;
        llama_sampler *      sampler = ggml_ext_sampler_fused(&c.params);
        std::vector<int64_t> counts(c.logits.size());
        for (int64_t j = 0; j < draws_per_case / 20; j++) {
            counts[size_t(ggml_ext_sampler_sample_logits(sampler, c.logits.data(), int32_t(c.logits.size())))]++;
        }
        llama_sampler_free(sampler);
        values.push_back(counts_p_value(sampler_reference::kept(c.logits, c.params), counts));
    }
    check_p_values("whole samplings", values);
}

}  // namespace

int main() {
    test_statistics();
    test_sweep();
    test_prepared();
    test_whole();
    return check_done();
}
