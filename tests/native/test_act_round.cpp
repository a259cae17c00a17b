// GGML_EXT_OP_ACT_ROUND: every path and thread count against the definition, bit for bit.

#include "act_round/cpu/act_round.h"
#include "check.h"
#include "core/ext_op.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

namespace {

std::mt19937 rng(99);

int64_t uniform(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(rng);
}

bool same(float a, float b) {
    return a == b || (std::isnan(a) && std::isnan(b));
}

// The definition of core/ext_op.h, one group.
void round_group(const float * x, float * y, int64_t n, int bits) {
    const float q_max = (float) ((1 << (bits - 1)) - 1);
    float       max   = 0.0f;
    for (int64_t i = 0; i < n; i++) {
        max = std::isnan(x[i]) ? max : std::fmax(max, std::fabs(x[i]));
    }
    const float scale = max / q_max;
    for (int64_t i = 0; i < n; i++) {
        const float q = std::nearbyint(x[i] / scale);
        y[i]          = scale == 0.0f ? x[i] * 0.0f : std::isnan(q) ? NAN : std::clamp(q, -q_max, q_max) * scale;
    }
}

void check(int64_t n, std::vector<int64_t> rows, int bits, int group, bool gaps, int special) {
    const ggml_init_params params = { 16 * 1024 * 1024, nullptr, false };
    ggml_context *         ctx    = ggml_init(params);
    ggml_tensor *          whole  = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n + 5 * gaps, rows[0], rows[1]);

    std::student_t_distribution<float> dist(3.0f);
    float *                            data = (float *) whole->data;
    const int64_t                      size = ggml_nelements(whole);
    std::generate(data, data + size, [&] { return dist(rng); });
    const float values[] = { NAN, INFINITY, 0.0f, 1e-45f, 1e-38f };
    for (int i = 0; special && i < 5; i++) {
        std::fill_n(data + uniform(0, size - 1), 1, values[i]);
    }
    if (special == 2) {  // groups of zeros, of NaN, and of numbers whose scale is no normal number
        std::fill_n(data, std::min<int64_t>(size, group ? group : n), 0.0f);
        for (int64_t i = size / 2; i < size; i++) {
            data[i] = (float) uniform(-20, 20) * 1e-45f;
        }
        data[size - 1] = NAN;
    }

    ggml_tensor *      x = ggml_view_3d(ctx, whole, n, rows[0], rows[1], whole->nb[1], whole->nb[2], 4 * gaps);
    ggml_tensor *      y = ggml_ext_act_round(ctx, x, bits, group);
    std::vector<float> want(ggml_nelements(y));
    for (int64_t row = 0; row < rows[0] * rows[1]; row++) {
        const float * px =
            (const float *) ((const char *) x->data + row % rows[0] * x->nb[1] + row / rows[0] * x->nb[2]);
        const int64_t step = group ? group : n;
        for (int64_t i = 0; i < n; i += step) {
            round_group(px + i, want.data() + row * n + i, std::min(step, n - i), bits);
        }
    }
    for (int n_threads = 1; n_threads <= 5; n_threads++) {
        ggml_cgraph * graph = ggml_new_graph(ctx);
        ggml_build_forward_expand(graph, y);
        ggml_cplan plan = ggml_graph_plan(graph, std::min(n_threads, 4), nullptr);
        plan.use_ref    = n_threads == 5;
        std::memset(y->data, 0xff, ggml_nbytes(y));
        std::vector<uint8_t> work(plan.work_size);
        plan.work_data = work.data();
        CHECK(ggml_graph_compute(graph, &plan) == GGML_STATUS_SUCCESS, "status");
        for (size_t i = 0; i < want.size(); i++) {
            const float got = ((const float *) y->data)[i];
            if (!same(got, want[i])) {
                CHECK(false, "n %d bits %d group %d threads %d: value %zu: %g, expected %g", (int) n, bits, group,
                      n_threads, i, got, want[i]);
                break;
            }
        }
    }
    ggml_free(ctx);
}

// Each path of this machine, called directly, against the generic one.
void test_paths() {
    const ggml_ext_act_round_path & ref = *ggml_ext_act_round_paths[ggml_ext_act_round_n_paths - 1];
    CHECK(std::strcmp(ref.name, "generic") == 0 && ref.available(), "the last path is generic");
    std::normal_distribution<float> dist;
    for (int i = 0; i < ggml_ext_act_round_n_paths; i++) {
        const ggml_ext_act_round_path & path = *ggml_ext_act_round_paths[i];
        if (!path.available()) {
            std::printf("path %s: not on this machine\n", path.name);
            continue;
        }
        for (int n = 1; n < 100; n++) {
            std::vector<float> x(n), want(n), got(n + 1, 7.0f);
            std::generate(x.begin(), x.end(), [&] { return dist(rng); });
            x[uniform(0, n - 1)] = NAN;
            const float max      = ref.abs_max(n, x.data());
            CHECK(path.abs_max(n, x.data()) == max, "%s: abs_max of %d", path.name, n);
            // 0.5 is a power of two: ties occur.
            for (float scale : { max > 0 ? max / 7 : 1.0f, 0.5f }) {
                x[0] = 1.25f;
                ref.round(n, scale, 7.0f, x.data(), want.data());
                path.round(n, scale, 7.0f, x.data(), got.data());
                CHECK(std::equal(want.begin(), want.end(), got.begin(), same), "%s: round of %d", path.name, n);
                CHECK(got.back() == 7.0f, "%s: written past the end", path.name);
            }
        }
    }
}

void test_ties() {
    const float q_max = 127.0f, x[] = { 0.5f, 1.5f, 2.5f, -0.5f, -1.5f, 126.5f, 200.0f, -200.0f };
    const float want[] = { 0.0f, 2.0f, 2.0f, 0.0f, -2.0f, 126.0f, 127.0f, -127.0f };
    for (int i = 0; i < ggml_ext_act_round_n_paths; i++) {
        float got[8];
        if (ggml_ext_act_round_paths[i]->available()) {
            ggml_ext_act_round_paths[i]->round(8, 1.0f, q_max, x, got);
            CHECK(std::equal(want, want + 8, got), "%s: ties go to even", ggml_ext_act_round_paths[i]->name);
        }
    }
}

}  // namespace

int main() {
    ggml_cpu_init();
    test_paths();
    test_ties();
    for (int bits = 2; bits <= 8; bits++) {
        for (int group : { 0, 1, 32, 256, 37, 100000 }) {
            for (int special = 0; special < 3; special++) {
                check(uniform(1, 600), { 1, 1 }, bits, group, special == 1, special);
                check(uniform(1, 70), { uniform(1, 7), uniform(1, 7) }, bits, group, special != 1, special);
            }
        }
    }
    check(8192, { 1, 1 }, 4, 0, false, 0);
    check(2048, { 33, 1 }, 4, 32, false, 0);
    return check_done();
}
