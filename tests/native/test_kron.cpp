// GGML_EXT_OP_KRON: every path and thread count against matrix products in double.

#include "check.h"
#include "core/ext_op.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include "kron/cpu/kron.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

namespace {

std::mt19937 rng(4321);

int64_t uniform(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(rng);
}

void fill(ggml_tensor * t) {
    std::normal_distribution<float> dist;
    for (int64_t i = 0; i < ggml_nelements(t); i++) {
        const float v = dist(rng);
        if (t->type == GGML_TYPE_F16) {
            ((ggml_fp16_t *) t->data)[i] = ggml_fp32_to_fp16(v);
        } else {
            ((float *) t->data)[i] = v;
        }
    }
}

// A factor as doubles, row-major: the tensor, a Hadamard matrix, or the identity.
std::vector<double> dense(const ggml_tensor * t, bool hadamard, int64_t order) {
    std::vector<double> m(order * order);
    for (int64_t i = 0; i < order; i++) {
        for (int64_t j = 0; j < order; j++) {
            const int64_t at = i * order + j;
            m[at]            = !t && hadamard ? (__builtin_popcountll(i & j) % 2 ? -1 : 1) / std::sqrt((double) order) :
                               !t             ? i == j :
                               t->type == GGML_TYPE_F16 ? ggml_fp16_to_fp32(((const ggml_fp16_t *) t->data)[at]) :
                                                          ((const float *) t->data)[at];
        }
    }
    return m;
}

struct Case {
    int64_t              n1, n2;
    std::vector<int64_t> rows;              // ne1..ne3
    int                  left     = -1;     // ggml_type or -1
    int                  right    = -1;
    bool                 hadamard = false;  // of order n2
    float                clip     = 1.0f;
    int                  layout   = 0;      // of x: 0 contiguous, 1 rows with gaps, 2 dimensions 1 and 2 swapped

    std::string text() const {
        char s[160];
        std::snprintf(s, sizeof(s), "n %dx%d rows %dx%dx%d left %d right %d hadamard %d clip %g layout %d", (int) n1,
                      (int) n2, (int) rows[0], (int) rows[1], (int) rows[2], left, right, hadamard, clip, layout);
        return s;
    }
};

// One case in one context; result and reference are read after compute().
struct Run {
    ggml_context * ctx;
    ggml_tensor *  x;
    ggml_tensor *  left  = nullptr;
    ggml_tensor *  right = nullptr;
    ggml_tensor *  y;
    Case           c;

    explicit Run(const Case & spec) : c(spec) {
        const int64_t          n      = c.n1 * c.n2;
        const ggml_init_params params = { 64 * 1024 * 1024, nullptr, false };
        ctx                           = ggml_init(params);
        const int64_t pad             = c.layout == 1 ? 3 : 0;
        const bool    swap            = c.layout == 2;
        ggml_tensor * whole = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, n + pad, c.rows[swap], c.rows[!swap], c.rows[2]);
        fill(whole);
        x     = swap ? ggml_permute(ctx, whole, 0, 2, 1, 3) :
                pad ? ggml_view_4d(ctx, whole, n, c.rows[0], c.rows[1], c.rows[2], whole->nb[1], whole->nb[2], whole->nb[3],
                                   sizeof(float)) :
                      whole;
        left  = c.left >= 0 ? ggml_new_tensor_2d(ctx, (ggml_type) c.left, c.n1, c.n1) : nullptr;
        right = c.right >= 0 ? ggml_new_tensor_2d(ctx, (ggml_type) c.right, c.n2, c.n2) : nullptr;
        for (ggml_tensor * t : { left, right }) {
            if (t) {
                fill(t);
            }
        }
        y = ggml_ext_kron(ctx, x, left, right, c.hadamard ? (int) c.n2 : 0, c.clip);
    }

    Run(const Run &)             = delete;
    Run & operator=(const Run &) = delete;

    ~Run() { ggml_free(ctx); }

    const float * row(int64_t i1, int64_t i2, int64_t i3) const {
        return (const float *) ((const char *) x->data + i1 * x->nb[1] + i2 * x->nb[2] + i3 * x->nb[3]);
    }

    std::vector<float> compute(int n_threads, bool use_ref = false) {
        std::memset(y->data, 0xff, ggml_nbytes(y));
        ggml_cgraph * graph = ggml_new_graph(ctx);
        ggml_build_forward_expand(graph, y);
        ggml_cplan           plan = ggml_graph_plan(graph, n_threads, nullptr);
        std::vector<uint8_t> work(plan.work_size);
        plan.work_data = work.data();
        plan.use_ref   = use_ref;
        CHECK(ggml_graph_compute(graph, &plan) == GGML_STATUS_SUCCESS, "status");
        return std::vector<float>((const float *) y->data, (const float *) y->data + ggml_nelements(y));
    }
};

// y = left^T X right of one row in double; bound[i] is the sum of the absolute values of its terms.
void product(const std::vector<double> & left, const std::vector<double> & right, int64_t n1, int64_t n2,
             const float * x, std::vector<double> & y, std::vector<double> & bound) {
    std::vector<double> z(n1 * n2), za(n1 * n2);
    for (int64_t i = 0; i < n1; i++) {
        for (int64_t a = 0; a < n1; a++) {
            const double l = left[i * n1 + a];
            for (int64_t j = 0; l != 0 && j < n2; j++) {
                z[a * n2 + j] += l * x[i * n2 + j];
                za[a * n2 + j] += std::fabs(l * x[i * n2 + j]);
            }
        }
    }
    y.assign(n1 * n2, 0.0);
    bound.assign(n1 * n2, 0.0);
    for (int64_t a = 0; a < n1; a++) {
        for (int64_t j = 0; j < n2; j++) {
            for (int64_t b = 0; b < n2; b++) {
                y[a * n2 + b] += right[j * n2 + b] * z[a * n2 + j];
                bound[a * n2 + b] += std::fabs(right[j * n2 + b]) * za[a * n2 + j];
            }
        }
    }
}

void check_values(const Run & run, const std::vector<float> & got) {
    const double        unit = std::numeric_limits<float>::epsilon() * (double) (run.c.n1 + run.c.n2 + 4);
    std::vector<double> y, bound;
    const auto          left    = dense(run.left, false, run.c.n1);
    const auto          right   = dense(run.right, run.c.hadamard, run.c.n2);
    const float *       row_got = got.data();
    for (int64_t i3 = 0; i3 < run.x->ne[3]; i3++) {
        for (int64_t i2 = 0; i2 < run.x->ne[2]; i2++) {
            for (int64_t i1 = 0; i1 < run.x->ne[1]; i1++, row_got += run.x->ne[0]) {
                product(left, right, run.c.n1, run.c.n2, run.row(i1, i2, i3), y, bound);
                double max = 0;
                for (double v : y) {
                    max = std::fmax(max, std::fabs(v));
                }
                const double limit = run.c.clip < 1.0f ? run.c.clip * max : INFINITY;
                for (size_t i = 0; i < y.size(); i++) {
                    const double want      = std::fmin(std::fmax(y[i], -limit), limit);
                    const double tolerance = unit * (bound[i] + (run.c.clip < 1.0f ? max : 0.0));
                    if (!(std::fabs(row_got[i] - want) <= tolerance)) {
                        CHECK(false, "%s: [%d %d %d] value %zu: %g, expected %g", run.c.text().c_str(), (int) i1,
                              (int) i2, (int) i3, i, row_got[i], want);
                        return;
                    }
                }
            }
        }
    }
}

void check(const Case & c) {
    Run                      run(c);
    const std::vector<float> one = run.compute(1);
    check_values(run, one);
    check_values(run, run.compute(1, true));
    for (int n_threads = 2; n_threads <= 4; n_threads++) {
        const std::vector<float> many = run.compute(n_threads);
        CHECK(std::memcmp(one.data(), many.data(), one.size() * sizeof(float)) == 0, "%s: %d threads differ",
              c.text().c_str(), n_threads);
    }
}

std::vector<int64_t> some_rows() {
    switch (uniform(0, 3)) {
        case 0:
            return { 1, 1, 1 };
        case 1:
            return { uniform(1, 5), 1, 1 };
        case 2:
            return { uniform(1, 3), uniform(1, 3), uniform(1, 2) };
        default:
            return { uniform(20, 40), 1, 1 };
    }
}

void test_random() {
    const int   types[] = { -1, GGML_TYPE_F32, GGML_TYPE_F16 };
    const float clips[] = { 1.0f, 0.9f, 0.31f };
    for (int left : types) {
        for (int right : types) {
            for (bool hadamard : { false, true }) {
                for (float clip : clips) {
                    for (int layout = 0; layout < 3; layout++) {
                        if ((hadamard && right >= 0) || (left < 0 && right < 0 && !hadamard && clip == 1.0f)) {
                            continue;
                        }
                        const int64_t n2 = hadamard ? int64_t(1) << uniform(1, 6) : uniform(1, 70);
                        check({ uniform(1, 24), n2, some_rows(), left, right, hadamard, clip, layout });
                    }
                }
            }
        }
    }
}

// The shapes of real models, one and a few tokens.
void test_shapes() {
    for (int type : { GGML_TYPE_F32, GGML_TYPE_F16 }) {
        check({
            32, 64, { 1, 1, 1 },
              type, type
        });
        check({
            64, 32, { 5, 1, 1 },
              type, type, false, 0.95f
        });
        check({
            64, 128, { 1, 1, 1 },
              type, type, false, 0.95f
        });
        check({
            32, 64, { 2, 1, 1 },
              type, -1
        });
        check({
            112, 128, { 1, 1, 1 },
              type, -1, true
        });
    }
    check({
        1, 8192, { 1, 1, 1 },
          -1, -1, true
    });
    check({
        7, 128, { 3, 4, 1 },
          -1, GGML_TYPE_F32
    });
}

// What identity factors would lose: exactness, on which "off means stock" rests.
void test_identity() {
    for (int type : { GGML_TYPE_F32, GGML_TYPE_F16 }) {
        for (int which = 1; which < 4; which++) {
            for (int n_threads = 1; n_threads <= 4; n_threads++) {
                Run run({
                    24, 37, { 3, 2, 1 },
                      which & 1 ? type : -1, which & 2 ? type : -1
                });
                for (ggml_tensor * t : { run.left, run.right }) {
                    for (int64_t i = 0; t && i < ggml_nelements(t); i++) {
                        const float v = i % (t->ne[0] + 1) == 0;
                        if (type == GGML_TYPE_F16) {
                            ((ggml_fp16_t *) t->data)[i] = ggml_fp32_to_fp16(v);
                        } else {
                            ((float *) t->data)[i] = v;
                        }
                    }
                }
                const std::vector<float> y = run.compute(n_threads);
                CHECK(std::memcmp(y.data(), run.x->data, y.size() * sizeof(float)) == 0, "type %d factors %d", type,
                      which);
            }
        }
    }
}

// A NaN reaches every value that its row and column feed and nothing else; the clip neither hides nor
// spreads it.
void test_nan() {
    for (int n_threads = 1; n_threads <= 4; n_threads++) {
        Run     run({
            8, 33, { 1, 1, 1 },
              -1, GGML_TYPE_F32, false, 0.5f
        });
        float * x      = (float *) run.x->data;
        x[2 * 33]      = NAN;
        const auto y   = run.compute(n_threads);
        float      max = 0;
        for (int i = 0; i < 8 * 33; i++) {
            CHECK(std::isnan(y[i]) == (i / 33 == 2), "value %d: %g", i, y[i]);
            max = std::fmax(max, std::fabs(y[i]));
        }
        CHECK(max > 0 && std::count_if(y.begin(), y.end(), [&](float v) { return std::fabs(v) == max; }) > 1,
              "the rest is clipped");
    }
}

// Each path of this machine, called directly, against the generic one.
void test_paths() {
    const ggml_ext_kron_path & ref = *ggml_ext_kron_paths[ggml_ext_kron_n_paths - 1];
    CHECK(std::strcmp(ref.name, "generic") == 0 && ref.available(), "the last path is generic");
    for (int i = 0; i < ggml_ext_kron_n_paths; i++) {
        const ggml_ext_kron_path & path = *ggml_ext_kron_paths[i];
        if (!path.available()) {
            std::printf("path %s: not on this machine\n", path.name);
            continue;
        }
        for (int round = 0; round < 300; round++) {
            const int64_t            rows = uniform(1, 20), cols = uniform(1, 80), depth = uniform(1, 40);
            const bool               f16 = round % 2;
            std::vector<float>       a(rows * depth), b(cols * depth), want(rows * cols), got(rows * cols + 1, 7.0f);
            std::vector<ggml_fp16_t> half(cols * depth);
            std::normal_distribution<float> dist;
            std::generate(a.begin(), a.end(), [&] { return dist(rng); });
            std::generate(b.begin(), b.end(), [&] { return dist(rng); });
            ggml_fp32_to_fp16_row(b.data(), half.data(), cols * depth);
            const bool            column_major = round % 3 == 0;
            ggml_ext_kron_product p            = { rows,
                                                   cols,
                                                   depth,
                                                   a.data(),
                                        column_major ? 1 : depth,
                                        column_major ? rows : 1,
                                        f16 ? (const void *) half.data() : b.data(),
                                                   f16,
                                                   cols,
                                                   want.data(),
                                                   cols };
            ref.product(&p);
            p.c = got.data();
            path.product(&p);
            CHECK(got.back() == 7.0f, "%s: written past the end", path.name);
            for (int64_t j = 0; j < rows * cols; j++) {
                CHECK(std::fabs(got[j] - want[j]) <= 1e-4f, "%s: %d x %d x %d, value %d: %g, expected %g", path.name,
                      (int) rows, (int) cols, (int) depth, (int) j, got[j], want[j]);
            }

            const int64_t      order = int64_t(1) << uniform(1, 8), n = order * uniform(1, 5);
            std::vector<float> u(n), v;
            std::generate(u.begin(), u.end(), [&] { return dist(rng); });
            v = u;
            ref.hadamard(n, order, u.data());
            path.hadamard(n, order, v.data());
            CHECK(std::memcmp(u.data(), v.data(), n * sizeof(float)) == 0, "%s: hadamard of order %d", path.name,
                  (int) order);

            const int64_t m      = uniform(1, n);
            u[uniform(0, n - 1)] = NAN;
            v                    = u;
            const float max      = ref.abs_max(m, u.data());
            CHECK(path.abs_max(m, v.data()) == max, "%s: abs_max of %d", path.name, (int) m);
            ref.clamp(m, 0.4f * max, u.data());
            path.clamp(m, 0.4f * max, v.data());
            CHECK(std::memcmp(u.data(), v.data(), n * sizeof(float)) == 0, "%s: clamp of %d", path.name, (int) m);
        }
    }
}

}  // namespace

int main() {
    ggml_cpu_init();
    test_paths();
    test_random();
    test_shapes();
    test_identity();
    test_nan();
    return check_done();
}
