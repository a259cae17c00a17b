// The CUDA kernels of attention with many queries in the emulator, against softmax(q k^T) v in double.
//
// The tolerance is that of test_attention.cpp: the reference, run once more with the rounding that the mode is stated
// to do (docs/attention.md, section CUDA), gives the error that this rounding causes on the same data; the kernels may
// be off by an eighth more and by the rounding of f16 weights.

#include "attention/prefill/launch.cuh"
#include "attention/prefill/op.h"
#include "attention_reference.h"
#include "check.h"
#include "ggml-ext.h"

using namespace attention;

namespace {

struct Mode {
    const char * name;
    bool         full, smooth;

    Rounding rounding(const Case & c) const {
        Rounding r;
        r.q_levels       = 127;
        r.k_levels       = c.k == GGML_TYPE_F16 ? 127 : 0;
        r.k_smooth       = c.k == GGML_TYPE_F16 && smooth;
        const bool bytes = full && c.dk <= 128;
        r.v_levels       = bytes ? 127 : 0;
        r.p_levels       = bytes ? 255 : 0;
        r.tile           = bytes ? 64 : c.n_kv;  // half: only of smoothing, whose mean is over all tokens
        return r;
    }
};

const Mode modes[] = {
    { "half/f16",        false, false },
    { "full/f16",        true,  false },
    { "half/f16/smooth", false, true  },
    { "full/f16/smooth", true,  true  },
};

// Weights of f16: 2^-12 of each, at random.
constexpr double f16_weights = 5e-4;

double tolerance(const Problem & problem, const std::vector<double> & want, const Mode & mode) {
    return 1.125 * relative_error(reference(problem, mode.rounding(problem.c)), want) + f16_weights;
}

// window, chunk: tiles of 64 kv tokens, 0 as planned for a device that runs 264 blocks of threads at once.
std::vector<float> compute(const Problem & problem, const Mode & mode, int chunk = 0, int window = 0) {
    CHECK(ggml_ext_attention_set(mode.name) == 0, "%s", mode.name);
    const struct ggml_ext_attention_setting setting = ggml_ext_attention_setting();
    const char *                            refusal = ggml_ext::attention_prefill_refusal(problem.out, setting);
    CHECK(!refusal, "%s: refused: %s", problem.c.text().c_str(), refusal);
    ggml_ext::attention_prefill p = ggml_ext::attention_prefill_of(problem.out, setting);
    ggml_ext::attention_plan(p, 264);
    if (window) {
        p.window    = window;
        p.n_windows = (p.n_tiles + window - 1) / window;
    }
    if (window || chunk) {
        p.chunk    = chunk ? chunk : p.window;
        p.n_chunks = (p.window + p.chunk - 1) / p.chunk;
    }
    const size_t                                size = ggml_ext::attention_place(p, nullptr);
    std::unique_ptr<char, decltype(&std::free)> workspace((char *) std::aligned_alloc(256, size), std::free);
    std::memset(workspace.get(), 0xff, size);
    std::memset(problem.out->data, 0xff, ggml_nbytes(problem.out));
    ggml_ext::attention_place(p, workspace.get());
    const auto prefill = [](const ggml_ext::attention_prefill & problem, cudaStream_t stream) {
        switch (problem.d) {
            case 64:
                return ggml_ext::attention_launch_prefill<64>(problem, stream);
            case 96:
                return ggml_ext::attention_launch_prefill<96>(problem, stream);
            case 128:
                return ggml_ext::attention_launch_prefill<128>(problem, stream);
            default:
                return ggml_ext::attention_launch_prefill<256>(problem, stream);
        }
    };
    ggml_ext_emulator::seed(problem.c.seed + 1);
    CHECK(ggml_ext::attention_launch(p, nullptr, prefill) == cudaSuccess, "launch");
    const float * values = (const float *) problem.out->data;
    return std::vector<float>(values, values + ggml_nelements(problem.out));
}

void check(const Case & c, const Mode & mode, int chunk = 0, int window = 0) {
    Problem                   problem(c);
    const std::vector<double> want  = reference(problem);
    const std::vector<float>  got   = compute(problem, mode, chunk, window);
    const double              error = relative_error(got, want), limit = tolerance(problem, want, mode);
    CHECK(error <= limit, "%s: %s chunk %d window %d: error %.3g, limit %.3g", mode.name, c.text().c_str(), chunk,
          window, error, limit);
    for (size_t row = 0; row < want.size(); row += c.dv) {
        const auto zero = [](double x) { return x == 0; };
        if (std::all_of(want.begin() + row, want.begin() + row + c.dv, zero)) {
            CHECK(std::all_of(got.begin() + row, got.begin() + row + c.dv, zero), "%s: %s: a masked row is not zero",
                  mode.name, c.text().c_str());
        }
    }
}

#ifdef __SANITIZE_ADDRESS__
constexpr unsigned n_random = 8;
#else
constexpr unsigned n_random = 14;
#endif

// Ragged sizes and all features at once. Catches: a fragment or a swizzle that is off, a scale of the wrong row or
// token, a tail that counts, a barrier that is missing (the order of threads changes with the seed).
void test_random() {
    const ggml_type types[] = { GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_F16 };
    const int64_t   dims[]  = { 64, 96, 128, 256 };
    std::mt19937    rng(11);
    const auto pick = [&](int64_t low, int64_t high) { return low + (int64_t) (rng() % (uint64_t) (high - low + 1)); };
    for (unsigned round = 0; round < n_random; round++) {
        Case c;
        c.dk = c.dv = dims[round % 4];
        c.n_kv      = pick(1, 129);
        c.gqa       = pick(1, 8);
        c.n_q       = pick(1, round % 8 ? 128 / c.gqa : 200 / c.gqa);
        c.heads_kv  = round % 3 ? 1 : 2;
        c.k         = types[pick(0, 2)];
        c.v         = types[pick(0, 2)];
        c.mask      = (Mask) pick(0, 2);
        c.layout    = (Layout) pick(0, 2);
        c.batch     = c.heads_kv == 1 && pick(0, 2) == 0 ? 2 : 1;
        c.sinks     = pick(0, 2) == 0;
        c.max_bias  = c.mask != NO_MASK && pick(0, 2) == 0 ? 8.0f : 0.0f;
        c.softcap   = pick(0, 2) ? 0.0f : 10.0f;
        c.outliers  = pick(0, 3) ? NONE : (Outliers) pick(1, 2);
        c.seed      = round;
        check(c, modes[(round + round / 4) % 4], (int) pick(0, 1), (int) (round % 3));
    }
}

// What a random draw seldom meets. Catches: causal structure that is aligned to the first token, skipped tiles whose
// chunk is then empty, rows of a kv head that are not those of a query, no mask at all.
void test_edges() {
    for (const Mode & mode : modes) {
        Case one = { 64, 64, 1, 1, 1, 1, GGML_TYPE_Q8_0, GGML_TYPE_Q8_0 };
        check(one, mode);
        one.mask = RANDOM;  // its only row is masked
        check(one, mode);
        one.sinks = true;
        check(one, mode);
    }
    const Mode & half = modes[0];
    const Mode & full = modes[1];
    check({ 64, 64, 200, 140, 1, 1, GGML_TYPE_F16, GGML_TYPE_F16 }, half, 1);        // two blocks of rows
    check({ 64, 64, 300, 9, 1, 3, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }, half, 2);        // tiles seen as a whole
    check({ 64, 64, 300, 9, 1, 3, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }, full, 2);
    check({ 64, 64, 64, 43, 1, 3, GGML_TYPE_Q8_0, GGML_TYPE_Q8_0, NO_MASK }, half);  // 129 rows, no ragged tail
    check({ 96, 96, 70, 65, 1, 1, GGML_TYPE_Q8_0, GGML_TYPE_Q8_0, CAUSAL, CACHE, 2 }, half);
    // Windows: the last one ragged, of two chunks or one each, whole windows hidden from a row, and with sinks.
    for (const Mode & mode : modes) {
        Case c = { 64, 64, 300, 140, 1, 1, GGML_TYPE_F16, GGML_TYPE_F16 };
        check(c, mode, 1, 2);
        c.sinks = true;
        check(c, mode, 0, 1);
    }
}

// One token holds half of every row and 499 share the rest: a step's weights must keep those that are small.
void test_flat_tail() {
    for (const Mode & mode : { modes[0], modes[1] }) {
        Case c       = { 64, 64, 500, 4, 1, 1, GGML_TYPE_Q8_0, GGML_TYPE_Q8_0, NO_MASK };
        c.sink_token = true;
        check(c, mode);
    }
}

// The distance from a broken reference has to be far beyond the tolerance, or the comparisons prove nothing.
void test_bugs() {
    std::vector<float>        got;
    const std::vector<Broken> broken = broken_references(16);
    const std::string         plain  = broken[0].c.text();
    for (const Broken & b : broken) {
        Problem problem(b.c);
        if (got.empty() || b.c.text() != plain) {
            got = compute(problem, modes[0]);
        }
        const double limit = tolerance(problem, reference(problem), modes[0]);
        const double error = relative_error(got, reference(problem, {}, b.bug));
        CHECK(error > 5 * limit, "%s: error %.3g, limit %.3g", b.name, error, limit);
    }
}

// A mode that did not round as stated would be too good.
void test_budget() {
    for (const Mode & mode : modes) {
        for (ggml_type type : { GGML_TYPE_Q8_0, GGML_TYPE_F16 }) {
            const Case   c = { 128, 128, 64, 20, 1, 2, type, type };
            Problem      problem(c);
            const auto   want   = reference(problem);
            const double budget = relative_error(reference(problem, mode.rounding(c)), want);
            const double error  = relative_error(compute(problem, mode), want);
            CHECK(error > 0.8 * budget, "%s: %s: error %.3g, stated %.3g", mode.name, c.text().c_str(), error, budget);
        }
    }
}

bool all_nan(const float * x, int64_t n) {
    return std::all_of(x, x + n, [](float value) { return std::isnan(value); });
}

// Rounding may differ where another row of the warp has its maximum raised at another step.
bool close(const float * x, const float * y, int64_t n) {
    return std::equal(x, x + n, y, [](float a, float b) { return std::fabs(a - b) < 0.02f; });
}

// A NaN or an infinity in q poisons its own row and no other.
void test_not_finite() {
    for (const Mode & mode : { modes[0], modes[1] }) {
        for (float value : { (float) NAN, INFINITY }) {
            const Case c = { 64, 64, 90, 3, 1, 2, GGML_TYPE_Q8_0, GGML_TYPE_Q8_0 };
            Problem    problem(c);
            const auto before                       = compute(problem, mode);
            ((float *) problem.q->data)[2 * 64 + 7] = value;  // query 1, head 0
            for (int chunk : { 0, 1 }) {
                const auto after = compute(problem, mode, chunk);
                for (int64_t row = 0; row < c.n_q * 2; row++) {
                    const float * at = after.data() + row * c.dv;
                    CHECK(row == 2 ? all_nan(at, c.dv) : close(at, before.data() + row * c.dv, c.dv),
                          "%s: row %d after q = %g", mode.name, (int) row, value);
                }
            }
        }
    }
}

// A scale of K or V (f16: a value) that is NaN or an infinity poisons the rows that see its token, and no other.
void test_poisoned_cache() {
    for (const Mode & mode : { modes[0], modes[1] }) {
        for (ggml_type type : { GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_F16 }) {
            const Case c      = { 64, 64, 90, 3, 2, 2, type, type };
            const auto before = compute(Problem(c), mode);
            for (bool in_k : { true, false }) {
                Problem             problem(c);
                const uint16_t      value = in_k ? 0x7e00 : 0xfc00;
                const ggml_tensor * cache = in_k ? problem.k : problem.v;
                // Kv head 1, seen by queries 1 and 2. A block starts with its scale.
                std::memcpy((char *) cache->data + (c.n_kv - 2) * cache->nb[1] + cache->nb[2], &value, 2);
                const auto after = compute(problem, mode);
                for (int64_t row = 0; row < c.n_q * 4; row++) {
                    const bool    sees = row / 4 >= 1 && row % 4 >= 2;
                    const float * at   = after.data() + row * c.dv;
                    CHECK(sees ? all_nan(at, c.dv) : close(at, before.data() + row * c.dv, c.dv),
                          "%s: %s: row %d after %x in %c", mode.name, c.text().c_str(), (int) row, value,
                          in_k ? 'K' : 'V');
                }
            }
        }
    }
}

// Chunks cover the cache once, are used where blocks are few, and leave no device slot idle that work could fill.
void test_plan() {
    using ggml_ext::attention_chunks;
    CHECK(attention_chunks(1000 * 264, 512, 264, 1) == 1, "enough blocks without chunks");
    CHECK(attention_chunks(128, 512, 264, 1) == 2, "128 blocks on 264 slots: halves");
    CHECK(attention_chunks(8, 512, 264, 1) == 16, "8 blocks: as many chunks as there may be");
    CHECK(attention_chunks(8, 512, 264, 40 << 20) == 3, "as many chunks as the bound on their memory allows");
    CHECK(attention_chunks(8, 7, 264, 1) == 1, "a short cache is not worth it");
    for (int n_kv : { 1, 64, 65, 4096, 33333 }) {
        for (int n_q : { 1, 33, 512, 5000 }) {
            ggml_ext::attention_prefill p = {};
            p.d = 128, p.n_q = n_q, p.n_kv = n_kv, p.heads_kv = 8, p.gqa = 4, p.n_streams = 1,
            p.k.type = ggml_ext::ATTENTION_Q8_0;
            ggml_ext::attention_plan(p, 264);
            CHECK(p.n_tiles * 64 >= n_kv && p.n_tiles * 64 < n_kv + 64, "n_kv %d", n_kv);
            CHECK(p.window * p.n_windows >= p.n_tiles && p.window * (p.n_windows - 1) < p.n_tiles, "n_kv %d n_q %d",
                  n_kv, n_q);
            CHECK(p.chunk * p.n_chunks >= p.window && p.chunk * (p.n_chunks - 1) < p.window, "n_kv %d n_q %d", n_kv,
                  n_q);
            CHECK(p.n_chunks <= ggml_ext::attention_max_chunks && p.padded_rows >= p.n_rows, "n_kv %d n_q %d", n_kv,
                  n_q);
        }
    }
}

// llama.cpp plans a context without the workspace: it must not grow with the cache. Per token there are a byte of the
// mask's summary for each block of rows and 64 tokens, and with smoothing a sum per channel for each head and 64 tokens.
void test_workspace() {
    const auto bytes = [](int n_kv, int n_q, int heads_kv, ggml_ext::attention_type type) {
        ggml_ext::attention_prefill p = {};
        p.d = 128, p.n_q = n_q, p.n_kv = n_kv, p.heads_kv = heads_kv, p.gqa = 32 / heads_kv, p.n_streams = 1,
        p.k.type = p.v.type = type, p.n_mask_streams = 1, p.mask.data = "";
        ggml_ext::attention_plan(p, 264);
        return (int64_t) ggml_ext::attention_place(p, nullptr);
    };
    for (auto type : { ggml_ext::ATTENTION_F16, ggml_ext::ATTENTION_Q8_0 }) {
        for (int heads_kv : { 1, 8, 32 }) {
            for (int n_q : { 64, 512, 2048 }) {
                // Beside K and V and parts of results: q, and the window before, 4 bytes per value.
                const int64_t queries = (int64_t) (n_q + 128) * 32 * (128 * 5 + 64);
                for (int n_kv : { 32768, 131072, 1 << 20 }) {
                    const int64_t size  = bytes(n_kv, n_q, heads_kv, type);
                    const int64_t bound = 2 * ggml_ext::attention_max_bytes + queries + (int64_t) n_kv * n_q / 64;
                    CHECK(size <= bound, "n_kv %d n_q %d heads %d: %d MB", n_kv, n_q, heads_kv, (int) (size / 1000000));
                }
            }
        }
    }
}

// What the kernels do not do is refused by name, and f16 caches without being asked.
void test_refusal() {
    const Case c   = { 64, 64, 90, 3, 1, 2, GGML_TYPE_Q8_0, GGML_TYPE_Q8_0 };
    Case       f16 = c, wide = c, other = c, heads = c, small = c;
    f16.k = f16.v    = GGML_TYPE_F16;
    wide.dv          = 128;
    other.k          = GGML_TYPE_Q5_0;
    heads.mask_heads = 2;
    small.dk = small.dv = 32;
    ggml_ext_attention_set("half");
    const struct ggml_ext_attention_setting setting = ggml_ext_attention_setting();
    CHECK(ggml_ext::attention_prefill_refusal(Problem(c).out, setting) == nullptr, "q8_0");
    for (const Case & refused : { f16, wide, other, heads, small }) {
        CHECK(ggml_ext::attention_prefill_refusal(Problem(refused).out, setting) != nullptr, "%s",
              refused.text().c_str());
    }
}

}  // namespace

int main() {
    ggml_cpu_init();
    test_plan();
    test_workspace();
    test_refusal();
    test_edges();
    test_random();
    test_flat_tail();
    test_bugs();
    test_budget();
    test_not_finite();
    test_poisoned_cache();
    return check_done();
}
