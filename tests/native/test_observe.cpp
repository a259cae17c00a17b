// The observer's sums against plain loops in double: ragged rows and channels, scattered rows, panels, sums that go on.

#include "check.h"
#include "ggml-ext.h"
#include "observe/moments.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

namespace {

std::mt19937 rng(5);

using floats = std::vector<float>;

floats normal(size_t n) {
    std::normal_distribution<float> draw(0.0f, 1.0f);
    floats                          values(n);
    std::generate(values.begin(), values.end(), [&] { return draw(rng); });
    return values;
}

// Rows of a buffer in random order, some of them twice, none of them adjacent.
ggml_ext_rows scattered(const floats & buffer, int64_t n, int64_t n_rows) {
    const int64_t                          stride = n + 3;
    std::uniform_int_distribution<int64_t> row(0, int64_t(buffer.size()) / stride - 1);
    ggml_ext_rows                          x;
    x.n = n;
    for (int64_t i = 0; i < n_rows; i++) {
        x.at.push_back(buffer.data() + row(rng) * stride);
        x.scale.push_back(0.5f + 0.25f * float(i % 4));
    }
    return x;
}

// Element (i, j), j >= i in its panel, where it is stored.
template <typename F> void each(int64_t n, F use) {
    int64_t at = 0;
    for (int64_t first = 0; first < n; first += GGML_EXT_MOMENT_PANEL) {
        for (int64_t i = first; i < std::min<int64_t>(first + GGML_EXT_MOMENT_PANEL, n); i++) {
            for (int64_t j = first; j < n; j++) {
                use(at++, i, j);
            }
        }
    }
}

std::vector<double> product(const ggml_ext_rows & x) {
    std::vector<double> sums(x.n * x.n);
    for (size_t r = 0; r < x.at.size(); r++) {
        for (int64_t i = 0; i < x.n; i++) {
            const double xi = double(x.at[r][i]) * x.scale[r];
            for (int64_t j = 0; j < x.n; j++) {
                sums[i * x.n + j] += xi * double(x.at[r][j]) * x.scale[r];
            }
        }
    }
    return sums;
}

void test_moment(ggml_ext_summer & summer, int64_t n, int64_t n_rows) {
    const floats        buffer = normal((n + 3) * 64);
    const ggml_ext_rows x = scattered(buffer, n, n_rows), more = scattered(buffer, n, 7);
    const int64_t       size = ggml_ext_moment_size(n);
    CHECK(size == ggml_ext_observer_size(n, 0, GGML_EXT_MOMENTS_SHARED) - 1, "n %lld", (long long) n);

    floats first(size, NAN), second(size, NAN), absmax(n, 0.0f);
    CHECK(summer.add_moment(x, nullptr, first.data(), absmax.data()) == 0, "n %lld", (long long) n);
    CHECK(summer.add_moment(more, first.data(), second.data(), nullptr) == 0, "n %lld", (long long) n);
    floats in_place = first;
    CHECK(summer.add_moment(more, in_place.data(), in_place.data(), nullptr) == 0, "n %lld", (long long) n);
    CHECK(in_place == second, "n %lld: in place and not", (long long) n);
    floats              same(size, NAN);
    const ggml_ext_rows none = { n, {}, {} };
    CHECK(summer.add_moment(none, first.data(), same.data(), nullptr) == 0 && same == first, "no rows");

    floats diagonal(n, NAN), further(n, NAN);
    CHECK(summer.add_diagonal(x, nullptr, diagonal.data()) == 0, "n %lld", (long long) n);
    CHECK(summer.add_diagonal(more, diagonal.data(), further.data()) == 0, "n %lld", (long long) n);
    CHECK(summer.add_diagonal(none, diagonal.data(), diagonal.data()) == 0, "no rows");

    const std::vector<double> wanted = product(x), added = product(more);
    for (int64_t c = 0; c < n; c++) {
        const double once = wanted[c * n + c], twice = once + added[c * n + c];
        CHECK(std::fabs(diagonal[c] - once) <= 1e-6 * once, "channel %lld: %g, not %g", (long long) c, diagonal[c],
              once);
        CHECK(std::fabs(further[c] - twice) <= 1e-6 * twice, "channel %lld: %g, not %g", (long long) c, further[c],
              twice);
    }
    double worst = 0;
    each(n, [&](int64_t at, int64_t i, int64_t j) {
        const auto relative = [&](double difference, const auto & power) {
            return std::fabs(difference) / (std::sqrt(power(i) * power(j)) + 1e-30);
        };
        const auto once  = [&](int64_t k) { return wanted[k * n + k]; };
        const auto twice = [&](int64_t k) { return wanted[k * n + k] + added[k * n + k]; };
        worst            = std::max(worst, relative(first[at] - wanted[i * n + j], once));
        worst            = std::max(worst, relative(second[at] - wanted[i * n + j] - added[i * n + j], twice));
    });
    CHECK(worst < 1e-5, "n %lld, %lld rows: %g", (long long) n, (long long) n_rows, worst);

    const std::vector<double> powers = summer.powers(x);
    for (size_t r = 0; r < x.at.size(); r++) {
        double power = 0;
        for (int64_t c = 0; c < n; c++) {
            power += double(x.at[r][c]) * x.at[r][c];
        }
        CHECK(std::fabs(powers[r] - power) <= 1e-5 * power, "row %zu: %g, not %g", r, powers[r], power);
    }
    for (int64_t c = 0; c < n; c++) {
        float largest = 0;
        for (size_t r = 0; r < x.at.size(); r++) {
            largest = std::max(largest, std::fabs(x.at[r][c] * x.scale[r]));
        }
        CHECK(absmax[c] == largest, "channel %lld", (long long) c);
    }
}

}  // namespace

int main() {
    CHECK(ggml_ext_observer_size(0, 0, 1) == GGML_EXT_E_SHAPE, "no channels");
    CHECK(ggml_ext_observer_size(4, -1, 1) == GGML_EXT_E_SHAPE, "negative experts");
    CHECK(ggml_ext_observer_size(4, 0, 3) == GGML_EXT_E_SHAPE, "unknown moments");
    CHECK(ggml_ext_observer_size(300, 2, GGML_EXT_MOMENTS_NONE) == 3 + 300 + 600, "diagonals only");
    CHECK(ggml_ext_observer_size(300, 2, GGML_EXT_MOMENTS_SHARED) == 3 + 256 * 300 + 44 * 44 + 600, "their diagonals");
    CHECK(ggml_ext_observer_size(300, 2, GGML_EXT_MOMENTS_OWN) == 3 + 3 * (256 * 300 + 44 * 44) + 600, "own moments");
    for (const int n_threads : { 1, 2 }) {
        ggml_ext_summer summer(n_threads);
        CHECK(summer.ready(), "no CPU backend");
        const std::pair<int64_t, int64_t> shapes[] = {
            { 1,   1    },
            { 5,   33   },
            { 255, 16   },
            { 256, 15   },
            { 257, 64   },
            { 600, 97   },
            { 96,  2049 }
        };
        for (const auto & [n, n_rows] : shapes) {
            test_moment(summer, n, n_rows);
        }
    }
    return check_done();
}
