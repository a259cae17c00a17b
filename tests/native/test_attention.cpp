// Quantised attention on the CPU against softmax(q k^T) v in double, every mode and path.
//
// The tolerance of a mode is not a constant. The reference, run once more with the rounding that the mode is stated to
// do, gives the error which that rounding causes on the very same data; the kernel may be off by a half more, and by
// `floor` for its float arithmetic. test_bugs shows that the tolerance still tells known bugs apart.

#include "attention_reference.h"
#include "check.h"

using namespace attention;

namespace {

struct Mode {
    const char * name;
    Rounding     rounding;
    double       floor;
};

// Upstream's row kernel: q is rounded to q8_0 blocks for quantised keys; V in F16 is summed in F16.
const Mode stock = {
    "off",
    { 127, 32 },
    1e-2
};

double tolerance(const Problem & problem, const std::vector<double> & want, const Mode & mode) {
    return 1.5 * relative_error(reference(problem, mode.rounding), want) + mode.floor;
}

void check(const Case & c, const Mode & mode) {
    Problem                   problem(c);
    const std::vector<double> want  = reference(problem);
    const std::vector<float>  one   = problem.compute(1);
    const double              error = relative_error(one, want), limit = tolerance(problem, want, mode);
    if (getenv("VERBOSE")) {
        printf("%.2e budget %.2e %s %s\n", error, (limit - mode.floor) / 1.5, mode.name, c.text().c_str());
    }
    CHECK(error <= limit, "%s: %s: error %.3g, limit %.3g", mode.name, c.text().c_str(), error, limit);
    for (size_t row = 0; row < want.size(); row += c.dv) {
        const auto zero = [](double x) { return x == 0; };
        if (std::all_of(want.begin() + row, want.begin() + row + c.dv, zero)) {
            CHECK(std::all_of(one.begin() + row, one.begin() + row + c.dv, zero), "%s: %s: a masked row is not zero",
                  mode.name, c.text().c_str());
        }
    }
}

void test_random(const Mode & mode) {
    const ggml_type types[] = { GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_F16 };
    const int64_t   dims[]  = { 64, 96, 128, 256 };
    std::mt19937    rng(7);
    const auto      pick = [&](int64_t low, int64_t high) { return low + (int64_t) (rng() % (high - low + 1)); };
    for (unsigned round = 0; round < 90; round++) {
        Case c       = { dims[pick(0, 3)], 0,          pick(1, 129),     pick(1, 129),
                         pick(1, 2),       pick(1, 8), types[round % 3], types[round / 3 % 3] };
        c.dv         = pick(0, 2) ? c.dk : dims[pick(0, 3)];
        c.mask       = (Mask) pick(0, 2);
        c.layout     = (Layout) pick(0, 2);
        c.batch      = pick(0, 3) ? 1 : 2;
        c.sinks      = pick(0, 2) == 0;
        c.max_bias   = c.mask != NO_MASK && pick(0, 2) == 0 ? 8.0f : 0.0f;
        c.softcap    = pick(0, 2) ? 0.0f : 10.0f;
        c.outliers   = pick(0, 3) ? NONE : (Outliers) pick(1, 2);
        c.mask_heads = pick(0, 3) ? 1 : c.heads_kv * c.gqa;
        c.seed       = round;
        check(c, mode);
    }
}

}  // namespace

int main() {
    ggml_cpu_init();
    test_random(stock);
    return check_done();
}
