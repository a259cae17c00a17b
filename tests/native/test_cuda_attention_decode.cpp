// The CUDA kernels of attention over a quantised cache in the emulator, against softmax(q k^T) v in double over the
// values of the cache, with the tolerance of test_attention.cpp: what the stated rounding of q causes on the same data,
// an eighth more, and the rounding of weights and values to f16 (test_bugs: known bugs exceed it five times,
// test_budget: no less error than stated).
//
// What would fail: a wrong lane, channel or scale of any type and head size, rows of the product mixed up (random); a
// tile edge or the cut into chunks off by one (edges); reads outside of the cache (sanitizer, and NaN behind it); a
// missing cp_async_wait, __syncwarp or __syncthreads (the emulator's order of threads; same bits for every seed); a
// poisoned token that reaches rows it is hidden from (not_finite, poisoned_cache); a grid that leaves a device idle (plan).

#include "attention/decode/args.h"
#include "attention/decode/launch.cuh"
#include "attention/decode/merge.cuh"
#include "attention_reference.h"
#include "check.h"

using namespace attention;
using namespace ggml_ext;

namespace {

constexpr size_t hopper_shared = 227 * 1024;

#ifdef __SANITIZE_ADDRESS__
constexpr unsigned n_random = 16;
#else
constexpr unsigned n_random = 44;
#endif

// As ggml_ext_cuda_attention_decode, on a device with n_sm multiprocessors.
std::vector<float> compute(Problem & problem, int n_sm) {
    std::memset(problem.out->data, 0xff, ggml_nbytes(problem.out));
    attention_decode_args args = attention_decode_make_args(problem.out, n_sm, hopper_shared);
    std::vector<float>    memory(attention_decode_memory(args), NAN);
    attention_decode_place_memory(args, memory.data());
    const cache_type k = cache_type_of(problem.k), v = cache_type_of(problem.v);
    const auto       launch = args.dim == 64  ? attention_decode_launch<64> :
                              args.dim == 96  ? attention_decode_launch<96> :
                              args.dim == 128 ? attention_decode_launch<128> :
                                                attention_decode_launch<256>;
    launch(args, k, v, nullptr);
    ggml_ext_cuda_launch(ggml_ext_attention_decode_merge_kernel, dim3(unsigned(args.n_out_rows())),
                         dim3(decode_merge_threads), 0, nullptr, args);
    const float * values = static_cast<const float *>(problem.out->data);
    return std::vector<float>(values, values + ggml_nelements(problem.out));
}

Rounding stated() {
    Rounding r;
    r.q_levels = 127;
    return r;
}

// Weights and values are rounded to 11 bits each, about 4e-4 together.
double tolerance(const Problem & problem, const std::vector<double> & want) {
    return 1.125 * relative_error(reference(problem, stated()), want) + 1e-3;
}

void check(const Case & c, int n_sm = 8) {
    Problem problem(c);
    CHECK(attention_decode_takes(problem.out, hopper_shared), "%s: not taken", c.text().c_str());
    const std::vector<double> want = reference(problem);
    ggml_ext_emulator::seed(c.seed);
    const std::vector<float> got   = compute(problem, n_sm);
    const double             error = relative_error(got, want), limit = tolerance(problem, want);
    CHECK(error <= limit, "%s: error %.3g, limit %.3g", c.text().c_str(), error, limit);
    for (size_t row = 0; row < want.size(); row += c.dv) {
        if (std::all_of(want.begin() + row, want.begin() + row + c.dv, [](double x) { return x == 0; })) {
            CHECK(std::all_of(got.begin() + row, got.begin() + row + c.dv, [](float x) { return x == 0; }),
                  "%s: a masked row is not zero", c.text().c_str());
        }
    }
}

// Every head size and pair of types, ragged sizes and all features at once.
void test_random() {
    const int64_t dims[] = { 64, 96, 128, 256 };
    std::mt19937  rng(11);
    const auto pick = [&](int64_t low, int64_t high) { return low + (int64_t) (rng() % (uint64_t) (high - low + 1)); };
    for (unsigned round = 0; round < n_random; round++) {
        Case c;
        c.dk = c.dv  = dims[round % 4];
        c.k          = round / 4 % 2 ? GGML_TYPE_Q4_0 : GGML_TYPE_Q8_0;
        c.v          = round / 8 % 2 ? GGML_TYPE_Q4_0 : GGML_TYPE_Q8_0;
        c.n_kv       = round % 6 ? pick(1, 140) : pick(1, 300);
        c.n_q        = pick(0, 1) ? 1 : pick(2, 8);
        c.heads_kv   = pick(1, 3);
        c.gqa        = pick(0, 1) ? pick(1, 8) : c.n_q == 1 ? pick(9, 17) : pick(1, 3);
        c.mask       = (Mask) pick(0, 2);
        c.layout     = (Layout) pick(0, 2);
        c.batch      = pick(0, 3) ? 1 : 2;
        c.sinks      = pick(0, 2) == 0;
        c.max_bias   = c.mask != NO_MASK && pick(0, 2) == 0 ? 8.0f : 0.0f;
        c.softcap    = pick(0, 2) ? 0.0f : 10.0f;
        c.outliers   = pick(0, 3) ? NONE : (Outliers) pick(1, 2);
        c.mask_heads = pick(0, 3) ? 1 : c.heads_kv * c.gqa;
        c.seed       = round;
        check(c, (int) pick(1, 12));
    }
}

// What a random draw seldom meets.
void test_edges() {
    for (ggml_type type : { GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        Case one = { 64, 64, 1, 1, 1, 1, type, type };
        check(one);
        one.mask = RANDOM;  // its only row is masked
        check(one);
        one.sinks = true;
        check(one);
        for (int64_t n_kv : { 15, 16, 17, 63, 64, 65, 128, 129 }) {  // steps and blocks of 64 tokens, full and not
            check({ 64, 64, n_kv, 1, 1, 4, type, type });
        }
        check({ 96, 96, 70, 2, 3, 3, type, type });  // rows of tokens begin at all even distances from 16
        check({ 128, 128, 257, 1, 1, 16, type, type, RANDOM, SPARE_ROWS, 2 });
        check({ 64, 64, 500, 1, 1, 4, type, type, NO_MASK }, 132);  // as many chunks as steps
        check({ 128, 128, 200, 8, 1, 8, type, type }, 1);           // four blocks of rows
        Case tail       = { 64, 64, 1500, 1, 1, 2, type, type, NO_MASK };
        tail.sink_token = true;
        check(tail, 2);
    }
}

// The distance of the result from a broken reference has to be far beyond the tolerance, or the comparison with the
// correct one proves nothing about that bug.
void test_bugs() {
    for (const Broken & b : broken_references(8)) {
        Problem      problem(b.c);
        const auto   got   = compute(problem, 8);
        const double limit = tolerance(problem, reference(problem));
        const double error = relative_error(got, reference(problem, {}, b.bug));
        CHECK(error > 5 * limit, "%s: error %.3g, limit %.3g", b.name, error, limit);
    }
}

void test_budget() {
    for (ggml_type type : { GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        const Case   c = { 128, 128, 120, 8, 1, 2, type, type };
        Problem      problem(c);
        const auto   want   = reference(problem);
        const double budget = relative_error(reference(problem, stated()), want);
        const double error  = relative_error(compute(problem, 8), want);
        CHECK(error > 0.8 * budget, "%s: error %.3g, stated %.3g", c.text().c_str(), error, budget);
    }
}

// The order of threads changes no bit; the number of chunks changes only the rounding of sums.
void test_deterministic() {
    const Case c = { 64, 64, 300, 2, 2, 4, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 };
    Problem    problem(c);
    const auto first = compute(problem, 8);
    for (unsigned seed = 1; seed <= 4; seed++) {
        ggml_ext_emulator::seed(seed);
        CHECK(compute(problem, 8) == first, "seed %u", seed);
    }
    const std::vector<double> want(first.begin(), first.end());
    for (int n_sm : { 1, 3, 132 }) {
        const double error = relative_error(compute(problem, n_sm), want);
        CHECK(error < 1e-3, "%d multiprocessors: %.3g away", n_sm, error);
    }
}

bool row_is(const std::vector<float> & x, int64_t row, int64_t n, bool nan) {
    return std::all_of(x.begin() + row * n, x.begin() + (row + 1) * n,
                       [&](float value) { return std::isnan(value) == nan; });
}

// A NaN or an infinity in q poisons the row it belongs to and no other.
void test_not_finite() {
    for (float value : { (float) NAN, INFINITY, -INFINITY }) {
        const Case c = { 64, 64, 90, 3, 1, 2, GGML_TYPE_Q8_0, GGML_TYPE_Q8_0 };
        Problem    problem(c);
        const auto before                       = compute(problem, 8);
        ((float *) problem.q->data)[2 * 64 + 7] = value;  // query 1, head 0
        const auto after                        = compute(problem, 8);
        for (int64_t row = 0; row < c.n_q * 2; row++) {
            const bool same =
                std::equal(after.begin() + row * c.dv, after.begin() + (row + 1) * c.dv, before.begin() + row * c.dv);
            CHECK(row == 2 ? row_is(after, row, c.dv, true) : same, "row %d after q = %g", (int) row, value);
        }
    }
}

// A scale of K or V that is NaN or an infinity poisons the rows that see its token and no other.
void test_poisoned_cache() {
    for (int64_t dim : { 64, 96, 256 }) {
        for (ggml_type type : { GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
            for (uint16_t value : { 0x7e00, 0x7c00, 0xfc00 }) {  // NaN, both infinities
                for (bool in_k : { true, false }) {
                    // The token is n_kv - 2, in the first or second half of its step.
                    const Case          c = { dim, dim, value == 0x7c00 ? 82 : 90, 3, 2, 2, type, type };
                    Problem             problem(c);
                    const auto          before = compute(problem, 8);
                    const ggml_tensor * cache  = in_k ? problem.k : problem.v;
                    // Kv head 1, token seen by queries 1 and 2, the last block's scale.
                    char *              row    = (char *) cache->data + (c.n_kv - 2) * cache->nb[1] + cache->nb[2];
                    std::memcpy(row + (dim / 32 - 1) * ggml_type_size(type), &value, 2);
                    const auto after = compute(problem, 8);
                    for (int64_t i = 0; i < c.n_q * 4; i++) {
                        const bool sees = i / 4 >= 1 && i % 4 >= 2;
                        const bool same = std::equal(after.begin() + i * dim, after.begin() + (i + 1) * dim,
                                                     before.begin() + i * dim);
                        CHECK(sees ? row_is(after, i, dim, true) : same, "%s: row %d after %x in %c", c.text().c_str(),
                              (int) i, value, in_k ? 'K' : 'V');
                    }
                }
            }
        }
    }
}

// All tokens are taken once, in whole steps; where there is enough work, nearly all slots are filled in each wave.
void test_plan() {
    for (int n_sm : { 1, 20, 68, 132, 148 }) {
        for (int n_kv : { 0, 1, 64, 65, 1000, 4096, 32768, 131072 }) {
            for (int heads_kv : { 1, 2, 8, 32 }) {
                for (int streams : { 1, 3, 64 }) {
                    attention_decode_args args = {};
                    args.n_kv                  = n_kv;
                    args.n_q                   = 2;
                    args.gqa                   = 4;
                    args.heads_kv              = heads_kv;
                    args.n_streams             = streams;
                    args.dim                   = 128;
                    const int slots            = 4 * n_sm;
                    decode_plan(args, slots);
                    const int64_t blocks = int64_t(args.n_chunks) * heads_kv * streams * args.n_row_blocks;
                    const int64_t tokens = int64_t(args.n_chunks) * args.chunk_tokens;
                    const int64_t waves  = (blocks + slots - 1) / slots;
                    CHECK(tokens >= n_kv && tokens - args.chunk_tokens < std::max(n_kv, 1) &&
                              args.chunk_tokens % (decode_warps * decode_step) == 0,
                          "%d tokens: %d chunks of %d", n_kv, args.n_chunks, args.chunk_tokens);
                    CHECK(n_kv < 32768 || double(blocks) / double(waves * slots) > 0.7,
                          "%d SMs, %d tokens, %d heads, %d streams: %ld blocks, %d slots", n_sm, n_kv, heads_kv,
                          streams, (long) blocks, slots);
                }
            }
        }
    }
    // An H200 and 8 kv heads of 128 over 32768 tokens: one wave that fills nearly all places.
    attention_decode_args args = {};
    args.n_kv                  = 32768;
    args.n_q                   = 1;
    args.gqa                   = 4;
    args.heads_kv              = 8;
    args.n_streams             = 1;
    args.dim                   = 128;
    decode_plan(args, 4 * 132);
    CHECK(args.n_chunks == 64 && args.chunk_tokens == 512, "%d chunks of %d", args.n_chunks, args.chunk_tokens);
    CHECK(decode_slots(132, hopper_shared, decode_shared_bytes(CACHE_Q8_0, CACHE_Q8_0, 128, 1), 128, 1) == 4 * 132,
          "four blocks of q8_0 per multiprocessor");
}

// What the kernels cannot do is left to others.
void test_limits() {
    const ggml_type type  = GGML_TYPE_Q8_0;
    const auto      takes = [](const Case & c, size_t shared) {
        Problem problem(c);
        return attention_decode_takes(problem.out, shared);
    };
    CHECK(takes({ 256, 256, 9, 1, 1, 1, type, type }, 99 * 1024), "256 channels in 99 KiB");
    CHECK(!takes({ 256, 256, 9, 1, 1, 1, type, type }, 64 * 1024), "256 channels in 64 KiB");
    CHECK(!takes({ 64, 64, 9, 9, 1, 1, type, type }, hopper_shared), "9 queries");
    CHECK(!takes({ 32, 32, 9, 1, 1, 1, type, type }, hopper_shared), "32 channels");
    CHECK(!takes({ 128, 64, 9, 1, 1, 1, type, type }, hopper_shared), "K and V of different sizes");
    CHECK(!takes({ 64, 64, 9, 1, 1, 1, GGML_TYPE_F16, type }, hopper_shared), "f16");
    CHECK(!takes({ 64, 64, 9, 1, 1, 1, type, GGML_TYPE_Q5_0 }, hopper_shared), "q5_0");
    Problem odd({ 128, 128, 9, 1, 1, 1, type, type });
    odd.k->nb[1] += 34;
    CHECK(!attention_decode_takes(odd.out, hopper_shared), "rows that are not aligned");
    Problem narrow({ 128, 128, 9, 1, 1, 1, type, type });
    narrow.out->src[0]->nb[2] += 4;
    CHECK(!attention_decode_takes(narrow.out, hopper_shared), "a Q that is not aligned");
}

}  // namespace

int main() {
    test_plan();
    test_limits();
    test_edges();
    test_random();
    test_bugs();
    test_budget();
    test_deterministic();
    test_not_finite();
    test_poisoned_cache();
    return check_done();
}
