// MUL_MAT and MUL_MAT_ID with FQ4 weights on the CPU backend, against double sums of the same integers: weights as
// decoded, activations as rounded (fq4-reference.h). What is left is the rounding of float sums, for which there is a
// bound, so no tolerance is a guess: at K = 256 it is smaller than one wrong unit in one product.

#include "check.h"
#include "fq4-kind.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <array>
#include <limits>
#include <string>

namespace {

using fq4_reference::BLOCK;
using fq4_reference::BLOCK_BYTES;
using fq4_reference::Rows;

constexpr int MAX_THREADS = 4;

std::mt19937 rng(2024);

int64_t uniform(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(rng);
}

enum Layout { CONTIGUOUS, GAPS, PERMUTED };  // of src1: rows with gaps; dimensions 1 and 2 swapped in memory

struct Case {
    int64_t                k, rows, cols;
    std::array<int64_t, 2> batch     = { 1, 1 };  // of the weights: ne2, ne3
    std::array<int64_t, 2> broadcast = { 1, 1 };  // src1 has so many times as much
    Layout                 layout    = CONTIGUOUS;
    bool                   strided   = false;     // rows of dst and of the weights with gaps
    int64_t                n_used    = 0;         // MUL_MAT_ID: experts per token; cols are tokens, batch[0] experts
    bool                   shared    = false;     // MUL_MAT_ID: one activation row for all experts of a token
    int64_t                favourite = -1;        // MUL_MAT_ID: every token's only expert
    float                  poison    = 0.0f;      // NaN or Inf in some columns

    std::string text() const {
        char s[200];
        std::snprintf(s, sizeof(s), "k %d rows %d cols %d batch %dx%d broadcast %dx%d layout %d strided %d used %d",
                      (int) k, (int) rows, (int) cols, (int) batch[0], (int) batch[1], (int) broadcast[0],
                      (int) broadcast[1], layout, strided, (int) n_used);
        return s;
    }
};

ggml_tensor * new_src1(ggml_context * ctx, const Case & c, const std::array<int64_t, 4> & ne) {
    switch (c.layout) {
        case GAPS: {
            ggml_tensor * wide = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, ne[0] + 24, ne[1] + 1, ne[2], ne[3]);
            return ggml_view_4d(ctx, wide, ne[0], ne[1], ne[2], ne[3], wide->nb[1], wide->nb[2], wide->nb[3],
                                8 * sizeof(float));
        }
        case PERMUTED:
            return ggml_permute(ctx, ggml_new_tensor_4d(ctx, GGML_TYPE_F32, ne[0], ne[2], ne[1], ne[3]), 0, 2, 1, 3);
        default:
            return ggml_new_tensor_4d(ctx, GGML_TYPE_F32, ne[0], ne[1], ne[2], ne[3]);
    }
}

// Spreads the rows of t, which nobody has used yet, over memory of their own with gaps.
void add_gaps(ggml_context * ctx, ggml_tensor * t, int64_t gap) {
    ggml_tensor * wide = ggml_new_tensor_4d(ctx, t->type, t->ne[0] + gap, t->ne[1], t->ne[2] + 1, t->ne[3]);
    t->data            = wide->data;
    std::copy(wide->nb + 1, wide->nb + 4, t->nb + 1);
}

char * row_at(const ggml_tensor * t, int64_t i1, int64_t i2, int64_t i3) {
    return (char *) t->data + i1 * t->nb[1] + i2 * t->nb[2] + i3 * t->nb[3];
}

template <typename F> void for_rows(const ggml_tensor * t, F f) {
    for (int64_t i3 = 0; i3 < t->ne[3]; i3++) {
        for (int64_t i2 = 0; i2 < t->ne[2]; i2++) {
            for (int64_t i1 = 0; i1 < t->ne[1]; i1++) {
                f(row_at(t, i1, i2, i3));
            }
        }
    }
}

// Every seventh row is zero; a block in eight has a scale of zero.
Rows fill_weights(ggml_tensor * t) {
    Rows    rows  = { t->ne[0] / BLOCK, {}, {} };
    int64_t index = 0;
    for_rows(t, [&](char * row) {
        const bool zero = index++ % 7 == 5;
        for (int64_t ib = 0; ib < rows.n_blocks; ib++) {
            uint8_t * block = (uint8_t *) row + ib * BLOCK_BYTES;
            double    d;
            int8_t    q[BLOCK];
            fq4_reference::random_block(rng, zero || rng() % 8 == 0 ? 0.0f : 1e-3f * (float) uniform(-99, 99), block);
            fq4_reference::decode(block, d, q);
            rows.d.push_back(d);
            rows.q.insert(rows.q.end(), q, q + BLOCK);
        }
    });
    return rows;
}

// Rows of different magnitude; every ninth is zero, every fifth holds one poisoned value.
Rows fill_activations(ggml_tensor * t, float poison) {
    std::normal_distribution<float> dist;
    Rows                            rows  = { t->ne[0] / BLOCK, {}, {} };
    int64_t                         index = 0;
    for_rows(t, [&](char * row) {
        float *     x     = (float *) row;
        const float scale = index % 9 == 4 ? 0.0f : std::ldexp(1.0f, (int) uniform(-12, 12));
        for (int64_t i = 0; i < t->ne[0]; i++) {
            x[i] = scale * dist(rng);
        }
        if (poison != 0.0f && index % 5 == 2) {
            x[uniform(0, t->ne[0] - 1)] = poison;
        }
        for (int64_t ib = 0; ib < rows.n_blocks; ib++) {
            double d;
            int8_t q[BLOCK];
            fq4_reference::round_activations(x + ib * BLOCK, d, q);
            rows.d.push_back(d);
            rows.q.insert(rows.q.end(), q, q + BLOCK);
        }
        index++;
    });
    return rows;
}

// Distinct experts per token, in a view whose rows have gaps, as top-k leaves them. Odd experts stay empty where
// there are enough of the others.
ggml_tensor * new_ids(ggml_context * ctx, const Case & c) {
    const int64_t        n_experts = c.batch[0];
    ggml_tensor *        all       = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, std::max(n_experts, c.n_used), c.cols);
    ggml_tensor *        ids       = ggml_view_2d(ctx, all, c.n_used, c.cols, all->nb[1], 0);
    std::vector<int32_t> experts;
    for (int32_t e = 0; e < n_experts; e++) {
        if (c.n_used > (n_experts + 1) / 2 || e % 2 == 0) {
            experts.push_back(e);
        }
    }
    for (int64_t token = 0; token < c.cols; token++) {
        std::shuffle(experts.begin(), experts.end(), rng);
        for (int64_t slot = 0; slot < c.n_used; slot++) {
            *(int32_t *) row_at(ids, token, 0, 0)        = 0;
            ((int32_t *) row_at(ids, token, 0, 0))[slot] = c.favourite >= 0 ? (int32_t) c.favourite : experts[slot];
        }
    }
    return ids;
}

struct Run {
    ggml_context * ctx;
    Case           c;
    ggml_tensor *  w;
    ggml_tensor *  x;
    ggml_tensor *  ids = nullptr;
    ggml_tensor *  y;
    ggml_cgraph *  graph;
    Rows           weights, activations;

    explicit Run(const Case & spec) : c(spec) {
        const ggml_init_params params = { 64 * 1024 * 1024, nullptr, false };
        ctx                           = ggml_init(params);
        w = ggml_new_tensor_4d(ctx, fq4_reference::TYPE, c.k, c.rows, c.batch[0], c.batch[1]);
        if (c.strided) {
            add_gaps(ctx, w, BLOCK);
        }
        if (c.n_used > 0) {
            x   = new_src1(ctx, c, { c.k, c.shared ? 1 : c.n_used, c.cols, 1 });
            ids = new_ids(ctx, c);
            y   = ggml_mul_mat_id(ctx, w, x, ids);
        } else {
            x = new_src1(ctx, c, { c.k, c.cols, c.batch[0] * c.broadcast[0], c.batch[1] * c.broadcast[1] });
            y = ggml_mul_mat(ctx, w, x);
        }
        if (c.strided) {
            add_gaps(ctx, y, 5);
        }
        weights     = fill_weights(w);
        activations = fill_activations(x, c.poison);
        graph       = ggml_new_graph(ctx);
        ggml_build_forward_expand(graph, y);
    }

    Run(const Run &) = delete;

    ~Run() { ggml_free(ctx); }

    std::vector<float> compute(int threads, bool reference) {
        ggml_backend_t backend = ggml_backend_cpu_init();
        ggml_backend_cpu_set_n_threads(backend, threads);
        ggml_backend_cpu_set_use_ref(backend, reference);
        for_rows(y, [&](char * row) { std::fill_n((float *) row, y->ne[0], 12345.0f); });
        CHECK(ggml_backend_graph_compute(backend, graph) == GGML_STATUS_SUCCESS, "%s", c.text().c_str());
        ggml_backend_free(backend);
        std::vector<float> out;
        for_rows(y, [&](char * row) { out.insert(out.end(), (float *) row, (float *) row + y->ne[0]); });
        return out;
    }

    // The rows of `weights` and `activations` that make the results from dst[0, i1, i2, i3] on.
    void sources(int64_t i1, int64_t i2, int64_t i3, int64_t & weight, int64_t & activation) const {
        if (ids) {
            weight     = c.rows * ((const int32_t *) row_at(ids, i2, 0, 0))[i1];
            activation = i2 * x->ne[1] + i1 % x->ne[1];
        } else {
            weight     = c.rows * (i3 / c.broadcast[1] * c.batch[0] + i2 / c.broadcast[0]);
            activation = (i3 * x->ne[2] + i2) * x->ne[1] + i1;
        }
    }

    void check(const std::vector<float> & out, const char * what) const {
        const float * at    = out.data();
        double        worst = 0;
        for (int64_t i3 = 0; i3 < y->ne[3]; i3++) {
            for (int64_t i2 = 0; i2 < y->ne[2]; i2++) {
                for (int64_t i1 = 0; i1 < y->ne[1]; i1++) {
                    int64_t weight, activation;
                    sources(i1, i2, i3, weight, activation);
                    for (int64_t row = 0; row < c.rows; row++, at++) {
                        const auto   p     = fq4_reference::multiply(weights, weight + row, activations, activation);
                        const double bound = fq4_reference::bound(weights.n_blocks, p.norm);
                        if (std::isnan(p.value)) {
                            CHECK(std::isnan(*at), "%s, %s, row %d: %g is no NaN", c.text().c_str(), what, (int) row,
                                  *at);
                        } else if (!(std::fabs(*at - p.value) <= bound)) {
                            CHECK(false, "%s, %s, row %d of (%d, %d, %d): %.9g, expected %.9g +- %.2g",
                                  c.text().c_str(), what, (int) row, (int) i1, (int) i2, (int) i3, *at, p.value, bound);
                            return;
                        }
                        worst = bound > 0 ? std::max(worst, std::fabs(*at - p.value) / bound) : worst;
                    }
                }
            }
        }
        CHECK(worst < 1, "%s", c.text().c_str());
    }
};

bool same_bits(const std::vector<float> & a, const std::vector<float> & b) {
    return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Breaks with a wrong index in any of batch, broadcast, strides, tile tails, column groups or experts; with work that
// two threads share or none does (a result stays 12345); with a float order that depends on threads; with a NaN or Inf
// that becomes a number, or spreads to another column.
void test(const Case & c) {
    Run                      run(c);
    const std::vector<float> one = run.compute(1, false);
    run.check(one, "fastest path");
    for (int threads = 2; threads <= MAX_THREADS; threads++) {
        CHECK(same_bits(run.compute(threads, false), one), "%s: %d threads", c.text().c_str(), threads);
    }
    if (c.rows * c.cols <= 4000) {
        run.check(run.compute(2, true), "generic path");
    }
}

void test_shapes() {
    for (int64_t cols : { 1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 33, 70 }) {
        test({ BLOCK * uniform(1, 3), uniform(1, 129), cols });
    }
    for (int64_t rows : { 1, 2, 31, 32, 33, 63, 64, 65, 128, 129 }) {
        test({ BLOCK, rows, uniform(1, 8) });
        test({ BLOCK, rows, uniform(9, 70) });
    }
    for (int64_t blocks = 2; blocks <= 8; blocks += 2) {
        test({ BLOCK * blocks, uniform(1, 40), uniform(1, 24) });
    }
    for (int64_t cols : { 511, 512, 513, 520, 1030 }) {
        test({ BLOCK, uniform(1, 40), cols });
    }
}

void test_batches() {
    for (int64_t cols : { 1, 8, 9, 19 }) {
        for (Layout layout : { CONTIGUOUS, GAPS, PERMUTED }) {
            for (bool strided : { false, true }) {
                test({
                    2 * BLOCK, uniform(1, 40), cols, { 2, 3 },
                          { 1, 1 },
                          layout, strided
                });
                test({
                    BLOCK, uniform(1, 70), cols, { 1, 2 },
                        { 4, 3 },
                        layout, strided
                });
                test({
                    BLOCK, uniform(1, 70), cols, { 3, 1 },
                        { 2, 2 },
                        layout, strided
                });
            }
        }
    }
}

void test_experts() {
    for (int64_t n_experts : { 1, 2, 3, 5, 8 }) {
        for (int64_t tokens : { 1, 2, 9, 40, 150 }) {
            for (bool shared : { false, true }) {
                Case c = {
                    BLOCK * uniform(1, 2), uniform(1, 70), tokens, { n_experts, 1 }
                };
                c.n_used  = uniform(1, n_experts);
                c.shared  = shared;
                c.layout  = (Layout) uniform(0, 2);
                c.strided = uniform(0, 1);
                test(c);
            }
        }
    }
    for (int64_t tokens : { 3, 8, 9, 530 }) {  // all on one expert, the others empty
        Case c = {
            BLOCK, 33, tokens, { 4, 1 }
        };
        c.n_used    = 1;
        c.favourite = 2;
        test(c);
    }
}

void test_poison() {
    for (float poison : { std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                          -std::numeric_limits<float>::infinity() }) {
        for (int64_t cols : { 3, 8, 9, 40 }) {
            Case c   = { 2 * BLOCK, 45, cols };
            c.poison = poison;
            test(c);
            c.batch  = { 4, 1 };
            c.n_used = 2;
            test(c);
        }
    }
}

}  // namespace

int main() {
    test_shapes();
    test_batches();
    test_experts();
    test_poison();
    return check_done();
}
