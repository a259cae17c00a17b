// Quantised attention on the CPU against softmax(q k^T) v in double, in every mode.
//
// The tolerance of a mode is no constant. The reference, run once more with the rounding that the mode is stated to
// do (docs/attention.md), gives the error that this rounding causes on the very same data. The kernel may be off by
// an eighth more, for ties and other orders of sums, and by the rounding of its floats. test_bugs shows that
// the tolerance tells known bugs apart, test_budget that each mode makes no less than its error: that it is on.

#include "attention/cpu/attention.h"
#include "attention_reference.h"
#include "check.h"
#include "ggml-ext.h"

using namespace attention;

namespace {

struct Mode {
    const char * name;
    int          p_levels;  // 0: upstream's kernel
    bool         f16    = false;
    bool         smooth = false;

    bool applies(const Case & c) const {
        return p_levels && (f16 || (c.k != GGML_TYPE_F16 && (c.v_in_k ? c.k : c.v) != GGML_TYPE_F16));
    }

    // q: 8 bits per row. Quantised K and V: as they are. F16: 8 bits per row, K without its tile's mean if smoothed.
    // Weights: 8 or 16 bits of the tile's largest, together with the scales of V. Upstream's row kernel: q in 8 bits
    // per block of 32 where K is quantised.
    Rounding rounding(const Case & c) const {
        const bool k_f16 = c.k == GGML_TYPE_F16, v_f16 = (c.v_in_k ? c.k : c.v) == GGML_TYPE_F16;
        Rounding   r;
        if (!applies(c)) {
            r.q_levels = k_f16 ? 0 : 127;
            r.q_group  = 32;
            return r;
        }
        r.q_levels = 127;
        r.k_levels = k_f16 ? 127 : 0;
        r.k_smooth = k_f16 && smooth;
        r.v_levels = v_f16 ? 127 : 0;
        r.v_group  = v_f16 ? 0 : 32;
        r.p_levels = p_levels;
        return r;
    }

    // Logits up to a few hundred in float32: 2^-24 of them, as a relative error of exp. Upstream adds up to 1500 weights
    // one by one, sums V of type F16 in f16 and rounds q to f16 for K of type F16.
    double floats(const Case & c) const {
        return applies(c) ? 1e-4 : c.k == GGML_TYPE_F16 || c.v == GGML_TYPE_F16 ? 1e-2 : 5e-4;
    }
};

const Mode modes[] = {
    { "off", 0 },
    { "half", 65535 },
    { "full", 255 },
    { "half/f16", 65535, true },
    { "full/f16", 255, true },
    { "half/f16/smooth", 65535, true, true },
    { "full/f16/smooth", 255, true, true },
};

double tolerance(const Problem & problem, const std::vector<double> & want, const Mode & mode) {
    return 1.125 * relative_error(reference(problem, mode.rounding(problem.c)), want) + mode.floats(problem.c);
}

void use(const Mode & mode) {
    CHECK(ggml_ext_attention_set(mode.name) == 0, "%s", mode.name);
}

bool is_zero(const float * x, int64_t n) {
    return std::all_of(x, x + n, [](float value) { return value == 0.0f; });
}

void check(const Case & c, const Mode & mode) {
    use(mode);
    Problem                   problem(c);
    const std::vector<double> want  = reference(problem);
    const std::vector<float>  one   = problem.compute(1);
    const double              error = relative_error(one, want), limit = tolerance(problem, want, mode);
    CHECK(error <= limit, "%s: %s: error %.3g, limit %.3g", mode.name, c.text().c_str(), error, limit);
    for (size_t row = 0; row < want.size(); row += c.dv) {
        if (std::all_of(want.begin() + row, want.begin() + row + c.dv, [](double x) { return x == 0; })) {
            CHECK(is_zero(one.data() + row, c.dv), "%s: %s: a masked row is not zero", mode.name, c.text().c_str());
        }
    }
    for (int n_threads = 2; mode.applies(c) && n_threads <= 4; n_threads++) {
        const std::vector<float> many = problem.compute(n_threads);
        CHECK(std::memcmp(one.data(), many.data(), one.size() * sizeof(float)) == 0, "%s: %s: %d threads differ",
              mode.name, c.text().c_str(), n_threads);
    }
}

// Ragged sizes and all features at once.
void test_random() {
    const ggml_type types[] = { GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_IQ4_NL };
    const int64_t   dims[]  = { 64, 96, 128, 256 };
    std::mt19937    rng(7);
    const auto pick = [&](int64_t low, int64_t high) { return low + (int64_t) (rng() % (uint64_t) (high - low + 1)); };
    for (unsigned round = 0; round < 84; round++) {
        Case c;
        c.dk              = dims[pick(0, 3)];
        c.dv              = pick(0, 2) ? c.dk : dims[pick(0, 3)];
        c.n_kv            = pick(1, 129);
        c.n_q             = round % 4 ? pick(1, 20) : pick(1, 129);
        c.heads_kv        = pick(1, 2);
        c.gqa             = pick(1, 8);
        c.k               = types[pick(0, 4)];
        c.v               = types[pick(0, 4)];
        c.mask            = (Mask) pick(0, 2);
        c.layout          = (Layout) pick(0, 2);
        c.batch           = pick(0, 3) ? 1 : 2;
        c.sinks           = pick(0, 2) == 0;
        c.max_bias        = c.mask != NO_MASK && pick(0, 2) == 0 ? 8.0f : 0.0f;
        c.softcap         = pick(0, 2) ? 0.0f : 10.0f;
        c.outliers        = pick(0, 3) ? NONE : (Outliers) pick(1, 2);
        c.mask_heads      = pick(0, 3) ? 1 : c.heads_kv * c.gqa;
        c.seed            = round;
        const Mode & mode = modes[round % 7];
        check(c, mode);
    }
}

// What a random draw seldom meets.
void test_edges() {
    for (const Mode & mode : modes) {
        for (ggml_type type : { GGML_TYPE_Q8_0, GGML_TYPE_F16 }) {
            if (mode.f16 && type != GGML_TYPE_F16) {
                continue;  // the same as without /f16
            }
            Case one = { 64, 64, 1, 1, 1, 1, type, type };
            check(one, mode);
            one.mask = RANDOM;  // its only row is masked
            check(one, mode);
            one.sinks = true;
            check(one, mode);
            check({ 80, 80, 45, 7, 2, 2, GGML_TYPE_F16, GGML_TYPE_F16 }, mode);
            check({ 128, 64, 129, 129, 1, 1, type, type }, mode);
            check({ 128, 128, 64, 128, 1, 2, type, type, NO_MASK }, mode);  // q longer than the cache
            check({ 64, 64, 130, 50, 2, 3, type, type }, mode);             // a later chunk of a prompt
            check({ 64, 64, 33, 2, 3, 7, type, type }, mode);               // 14 rows of a head
            check({ 256, 256, 65, 3, 1, 8, type, type, RANDOM, SPARE_ROWS, 2 }, mode);
            Case mla   = { 192, 128, 77, 5, 1, 8, type, type };
            mla.v_in_k = true;
            check(mla, mode);
        }
        // Decoding over a cache that is split among threads.
        if (mode.f16) {
            check({ 64, 64, 1100, 3, 1, 2, GGML_TYPE_F16, GGML_TYPE_F16, RANDOM, CACHE, 2 }, mode);
            continue;
        }
        check({ 64, 64, 1500, 1, 2, 4, GGML_TYPE_Q8_0, GGML_TYPE_Q8_0, NO_MASK }, mode);
        check({ 128, 128, 1409, 1, 1, 5, GGML_TYPE_Q4_0, GGML_TYPE_Q8_0, RANDOM, SPARE_ROWS, 1, 5 },
              mode);  // row 0: masked
        Case sinks  = { 64, 128, 700, 2, 2, 2, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 };
        sinks.sinks = true;
        check(sinks, mode);
    }
}

// One position holds half of every row and 1499 others share the rest, each below half a step of the largest weight's
// scale: a kernel that rounds weights against the row's maximum loses half of the result.
void test_flat_tail() {
    for (const Mode & mode : { modes[0], modes[1], modes[2] }) {
        for (int64_t n_q : { 1, 66 }) {
            Case c       = { 64, 64, 1500, n_q, 1, 2, GGML_TYPE_Q8_0, GGML_TYPE_Q8_0, NO_MASK };
            c.sink_token = true;
            check(c, mode);
            Problem                   problem(c);
            const std::vector<double> want = reference(problem);
            Rounding                  coarse;
            coarse.p_levels   = 255;
            coarse.v_group    = 32;
            const double lost = relative_error(reference(problem, coarse, FLAT_TAIL_LOST), want);
            CHECK(mode.p_levels != 255 || lost > 5 * tolerance(problem, want, mode),
                  "%s: a lost tail, %.3g, would pass", mode.name, lost);
        }
    }
}

// The distance of the kernel's result from a broken reference has to be far beyond the tolerance, or the comparison
// with the correct one proves nothing about that bug.
void test_bugs() {
    for (const Mode & mode : { modes[0], modes[1], modes[2] }) {
        use(mode);
        for (const Broken & b : broken_references(20)) {
            Problem      problem(b.c);
            const auto   got   = problem.compute(2);
            const double limit = tolerance(problem, reference(problem), mode);
            const double error = relative_error(got, reference(problem, {}, b.bug));
            CHECK(error > 5 * limit, "%s: %s: error %.3g, limit %.3g", mode.name, b.name, error, limit);
        }
    }
}

// A mode that silently did not apply would be too good.
void test_budget() {
    for (const Mode & mode : modes) {
        for (ggml_type type : { GGML_TYPE_Q8_0, GGML_TYPE_F16 }) {
            const Case c = { 128, 128, 120, 20, 2, 2, type, type };
            if (!mode.applies(c)) {
                continue;
            }
            use(mode);
            Problem      problem(c);
            const auto   want   = reference(problem);
            const double budget = relative_error(reference(problem, mode.rounding(c)), want);
            const double error  = relative_error(problem.compute(1), want);
            CHECK(error > 0.8 * budget, "%s: %s: error %.3g, stated %.3g", mode.name, c.text().c_str(), error, budget);
        }
    }
}

// Off, and types that are not ours, are upstream's kernel: its own bits.
void test_off() {
    for (ggml_type type : { GGML_TYPE_Q8_0, GGML_TYPE_F16 }) {
        const Case c = { 64, 64, 90, 2, 2, 4, type, type };
        Problem    problem(c);
        for (const Mode & mode : modes) {
            use(mode);
            const bool same = problem.compute(1) == problem.compute(1, true);
            CHECK(same == !mode.applies(c), "%s: %s: upstream's bits: %d", mode.name, c.text().c_str(), same);
        }
    }
    CHECK(ggml_ext_attention_set("quarter") == GGML_EXT_E_TYPE, "an unknown mode");
    CHECK(ggml_ext_attention_set(nullptr) == GGML_EXT_E_TYPE, "no mode");
    CHECK(ggml_ext_attention_set("default") == 0, "default");
}

// A NaN or an infinity in q poisons the row it belongs to, visibly, and no other. (Upstream loses a NaN where it rounds
// q to q8_0.)
void test_not_finite() {
    for (const Mode & mode : modes) {
        use(mode);
        for (ggml_type type : { GGML_TYPE_Q8_0, GGML_TYPE_F16 }) {
            if (!mode.applies({ 64, 64, 90, 3, 1, 2, type, type })) {
                continue;
            }
            for (float value : { (float) NAN, INFINITY }) {
                const Case c = { 64, 64, 90, 3, 1, 2, type, type };
                Problem    problem(c);
                const auto before                       = problem.compute(1);
                ((float *) problem.q->data)[2 * 64 + 7] = value;  // query 1, head 0
                const auto after                        = problem.compute(1);
                for (int64_t row = 0; row < c.n_q * 2; row++) {
                    const auto at   = after.begin() + row * c.dv;
                    const bool same = std::equal(at, at + c.dv, before.begin() + row * c.dv);
                    const bool nan  = std::all_of(at, at + c.dv, [](float x) { return std::isnan(x); });
                    CHECK(row == 2 ? nan : same, "%s: %s: row %d after q = %g", mode.name, c.text().c_str(), (int) row,
                          value);
                }
            }
        }
    }
}

// A scale of K or V that is NaN or an infinity poisons the rows that see its token, and no other.
void test_poisoned_cache() {
    for (const Mode & mode : modes) {
        use(mode);
        for (ggml_type type : { GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_F16 }) {
            for (int64_t n_kv : { 90, 700 }) {  // 700: in chunks
                const Case c = { 64, 64, n_kv, 3, 2, 2, type, type };
                if (!mode.applies(c)) {
                    continue;
                }
                for (uint16_t value : { 0x7e00, 0x7c00, 0xfc00 }) {  // NaN, both infinities
                    for (bool in_k : { true, false }) {
                        Problem             problem(c);
                        const auto          before = problem.compute(1);
                        const ggml_tensor * cache  = in_k ? problem.k : problem.v;
                        // Kv head 1, seen by queries 1 and 2. A block starts with its scale.
                        std::memcpy((char *) cache->data + (n_kv - 2) * cache->nb[1] + cache->nb[2], &value, 2);
                        const auto after = problem.compute(2);
                        for (int64_t row = 0; row < c.n_q * 4; row++) {
                            const bool sees = row / 4 >= 1 && row % 4 >= 2;
                            const auto at   = after.begin() + row * c.dv;
                            const bool nan  = std::all_of(at, at + c.dv, [](float x) { return std::isnan(x); });
                            const bool none = std::none_of(at, at + c.dv, [](float x) { return std::isnan(x); });
                            // The token is missing where the tile's largest scale, or its mean, is taken.
                            const bool same = std::equal(at, at + c.dv, before.begin() + row * c.dv,
                                                         [](float x, float y) { return std::fabs(x - y) < 0.02f; });
                            CHECK(sees ? nan : none && same, "%s: %s: row %d after %x in %c", mode.name,
                                  c.text().c_str(), (int) row, value, in_k ? 'K' : 'V');
                        }
                    }
                }
            }
        }
    }
}

}  // namespace

// Every path of this machine, the plain one only where there is no other: test_attention_paths holds the others to it.
int main() {
    ggml_cpu_init();
    int n_tested = 0;
    for (int i = 0; i < ggml_ext_attention_n_paths; i++) {
        const ggml_ext_attention_path & path = *ggml_ext_attention_paths[i];
        if (!path.available() || (n_tested && i == ggml_ext_attention_n_paths - 1)) {
            continue;
        }
        ggml_ext_attention_skip(i);
        n_tested++;
        CHECK(ggml_ext_attention_fastest() == &path, "path %s", path.name);
        const int before = check_failures;
        test_off();
        test_random();
        test_edges();
        test_flat_tail();
        test_bugs();
        test_budget();
        test_not_finite();
        test_poisoned_cache();
        std::printf("path %s: %d failures\n", path.name, check_failures - before);
    }
    return check_done();
}
