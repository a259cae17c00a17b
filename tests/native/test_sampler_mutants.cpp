// Selections that are wrong on purpose. Each must fail the comparison with the reference or the sweep of the draw: a
// check that a mutant passes checks nothing.

#include "check.h"
#include "sampler_draws.h"

namespace {

using namespace ggml_ext_sampling;

// Of equal logits the higher id comes first.
struct ties_reversed : rules {
    static bool before(const item & a, const item & b) {
        return a.key != b.key ? a.key < b.key : a.logit != b.logit ? a.logit > b.logit : a.index > b.index;
    }
};

// All candidates with the logit at the cut are kept.
struct ties_kept : rules {
    static bool keeps_tied(int32_t, int32_t) { return true; }
};

// The bucket of the cut is counted twice.
struct pivot_above : rules {
    static double lower_pivot(double below, double bucket) { return below + bucket; }
};

// What lies in front of the bucket of the cut is forgotten.
struct pivot_zero : rules {
    static double lower_pivot(double, double) { return 0; }
};

// The candidate that reaches the mass is dropped.
struct crossing_dropped : rules {
    static size_t last_kept(size_t crossing) { return crossing ? crossing - 1 : 0; }
};

// Top-p wants more than the mass.
struct top_p_strict : rules {
    static bool reached(double sum, double target, bool) { return sum > target; }
};

// Typical is content with the mass.
struct typical_lax : rules {
    static bool reached(double sum, double target, bool) { return sum >= target; }
};

// The draw takes the kept weights for probabilities.
struct draw_unnormalised : rules {
    static double draw_target(double u, double) { return u; }
};

// The draw reaches past the kept mass, and the last token gets what is too much.
struct draw_stretched : rules {
    static double draw_target(double u, double total) { return 1.01 * u * total; }
};

// Failures of the checks that the right rules pass.
template <class Rules> void count_failures(int * kept, int * sweep) {
    *kept = *sweep = 0;
    for (const int32_t n : { 300, 1500 }) {
        for (const sampler_case & c : sampler_cases(n)) {
            *kept += !kept_problem<Rules>(kernels_best(), c, sampler_reference::kept(c.logits, c.params)).empty();
            if (n == 300) {
                *sweep += !sweep_problem<Rules>(c).empty();
            }
        }
    }
}

template <class Mutant> void test_mutant(const char * name, bool wrong_set) {
    int kept, sweep;
    count_failures<Mutant>(&kept, &sweep);
    std::printf("%s: %d kept sets, %d sweeps differ\n", name, kept, sweep);
    CHECK(wrong_set ? kept > 0 : kept == 0 && sweep > 0, "%s is not noticed", name);
}

// The chi-square sees them too: those of the draw, and those of the set where the configurations have ties or a cut.
template <class Mutant> void test_statistics(const char * name) {
    int rejected = 0;
    for (const double value : draw_p_values<Mutant>(20, 100000)) {
        rejected += value < 1e-6;
    }
    std::printf("%s: chi-square rejects %d of 20\n", name, rejected);
    CHECK(rejected > 0, "%s is not noticed", name);
}

}  // namespace

int main() {
    int kept, sweep;
    count_failures<rules>(&kept, &sweep);
    CHECK(kept == 0 && sweep == 0, "the right rules fail %d and %d cases", kept, sweep);

    test_mutant<ties_reversed>("ties reversed", true);
    test_mutant<ties_kept>("ties kept", true);
    test_mutant<pivot_above>("pivot above", true);
    test_mutant<pivot_zero>("pivot zero", true);
    test_mutant<crossing_dropped>("crossing dropped", true);
    test_mutant<top_p_strict>("top-p strict", true);
    test_mutant<typical_lax>("typical lax", true);
    test_mutant<draw_unnormalised>("draw unnormalised", false);
    test_mutant<draw_stretched>("draw stretched", false);

    test_statistics<ties_reversed>("ties reversed");
    test_statistics<crossing_dropped>("crossing dropped");
    test_statistics<pivot_above>("pivot above");
    test_statistics<draw_unnormalised>("draw unnormalised");
    test_statistics<draw_stretched>("draw stretched");
    return check_done();
}
