// The CUDA kernel of GGML_EXT_OP_ACT_ROUND in the emulator, bit by bit against the definition: groups within one warp and
// over the block, a last group that is shorter, rows that are not adjacent, ties, zeros, NaN, Inf and numbers too small
// for a scale.

#include "act_round/act_round.cuh"
#include "check.h"

#include <random>

namespace {

std::mt19937 random_bits(5);

void check_group(const float * x, const float * y, int64_t n, float q_max) {
    float max = 0.0f;
    for (int64_t i = 0; i < n; i++) {
        max = std::fmax(max, std::fabs(x[i]));
    }
    const float scale = max / q_max;
    for (int64_t i = 0; i < n; i++) {
        const float q    = std::fmin(std::fmax(std::nearbyint(x[i] / scale), -q_max), q_max);
        const float want = std::isnan(x[i]) || std::isinf(max) ? std::nanf("") : scale > 0.0f ? q * scale : 0.0f;
        CHECK(std::isnan(want) ? std::isnan(y[i]) : y[i] == want, "value %ld: %g gives %g, not %g", (long) i, x[i],
              y[i], want);
    }
}

void check(int64_t n, uint32_t ne1, uint32_t ne2, uint32_t ne3, int64_t group, int bits) {
    const int64_t            nb = (n + 3) * 4;
    ggml_ext_act_round_shape s  = {
        n, int64_t(ne1) * ne2 * ne3, group, ne1, ne2, nb * ne2, nb, nb * ne1 * ne2, float((1 << (bits - 1)) - 1)
    };
    std::vector<float>              x(nb / 4 * s.n_rows), y(s.n_rows * n + 8, 99.0f);
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < x.size(); i++) {
        x[i] = i % 7 == 3 ? 0.5f * float(int(random_bits() % 30) - 15) : normal(random_bits);
    }
    const auto row = [&](int64_t r) {
        return x.data() + (r % ne1 * s.nb1 + r / ne1 % ne2 * s.nb2 + r / ne1 / ne2 * s.nb3) / 4;
    };
    if (s.n_rows >= 4) {
        std::fill(row(0), row(0) + n, 0.0f);
        std::fill(row(1), row(1) + n, 1e-45f);
        row(2)[n - 1] = std::nanf("");
        row(3)[n / 2] = -INFINITY;
    }
    const auto kernel = ggml_ext_act_round_lanes(group) == 32 ? ggml_ext_act_round_kernel<32> :
                                                                ggml_ext_act_round_kernel<GGML_EXT_ACT_ROUND_THREADS>;
    ggml_ext_cuda_launch(kernel, dim3(unsigned(ggml_ext_act_round_blocks(s))), dim3(GGML_EXT_ACT_ROUND_THREADS), 0,
                         nullptr, (const char *) x.data(), y.data(), s);
    for (int64_t r = 0; r < s.n_rows; r++) {
        for (int64_t i = 0; i < n; i += group) {
            check_group(row(r) + i, y.data() + r * n + i, std::min(group, n - i), s.q_max);
        }
    }
    for (int64_t i = s.n_rows * n; i < int64_t(y.size()); i++) {
        CHECK(y[i] == 99.0f, "past the end");
    }
}

}  // namespace

int main() {
    for (uint32_t seed : { 1u, 2u }) {
        ggml_ext_emulator::seed(seed);
        for (int bits : { 2, 4, 8 }) {
            check(1, 1, 1, 1, 1, bits);
            check(333, 5, 3, 2, 100, bits);
            check(333, 5, 3, 2, 333, bits);
            check(512, 4, 1, 1, 32, bits);
            check(3000, 4, 1, 1, 3000, bits);
            check(3000, 2, 2, 1, 1100, bits);
        }
    }
    return check_done();
}
