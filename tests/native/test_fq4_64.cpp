// FQ4_64: layout against the specification's words, encoder against brute force in double.

#include "check.h"
#include "fq4/fq4.h"
#include "fq4_64/fq4_64.h"
#include "ggml-cpu.h"
#include "ggml-ext.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

namespace {

constexpr int BLOCK = 64, BYTES = 35;

std::mt19937 rng(4321);

// The format as docs/gguf.md words it, written anew: what breaks if a nibble moves.
int spec_row(const uint8_t * block, int weight) {
    const int     sub_block = weight / 16;
    const uint8_t byte      = block[1 + sub_block / 2];
    return sub_block % 2 ? byte / 16 : byte % 16;
}

int spec_value(const uint8_t * block, int weight) {
    const uint8_t byte = block[3 + weight % 32];
    return ggml_ext_fq4_table[spec_row(block, weight)][weight >= 32 ? byte / 16 : byte % 16];
}

double spec_d(uint8_t byte) {
    return byte == 0 ? 0.0 : byte == 255 ? NAN : (1 + byte % 8 / 8.0) * std::pow(2.0, byte / 8 - 24);
}

std::vector<float> gaussian(int64_t n, float scale = 1.0f) {
    std::normal_distribution<float> dist(0.0f, scale);
    std::vector<float>              x(n);
    for (float & v : x) {
        v = dist(rng);
    }
    return x;
}

std::vector<float> student_t5(int64_t n) {
    std::student_t_distribution<float> dist(5.0f);
    std::vector<float>                 x(n);
    for (float & v : x) {
        v = dist(rng);
    }
    return x;
}

std::vector<uint8_t> quantize(ggml_type type, const std::vector<float> & x, int64_t n_per_row, const float * imatrix) {
    const int64_t        nrows = (int64_t) x.size() / n_per_row;
    std::vector<uint8_t> out(nrows * ggml_ext_row_size(type, n_per_row));
    const int64_t        size = ggml_ext_quantize(type, x.data(), out.data(), nrows, n_per_row, imatrix);
    CHECK(size == (int64_t) out.size(), "%lld bytes", (long long) size);
    return out;
}

double relative_error(ggml_type type, const std::vector<float> & x) {
    const std::vector<uint8_t> data = quantize(type, x, 1024, nullptr);
    std::vector<float>         y(x.size());
    ggml_ext_dequantize(type, data.data(), y.data(), (int64_t) x.size() / 1024, 1024);
    double num = 0, den = 0;
    for (size_t i = 0; i < x.size(); i++) {
        num += ((double) x[i] - y[i]) * ((double) x[i] - y[i]);
        den += (double) x[i] * x[i];
    }
    return num / den;
}

void test_dequantize() {
    uint8_t block[BYTES];
    for (int round = 0; round < 256; round++) {
        for (uint8_t & byte : block) {
            byte = (uint8_t) rng();
        }
        block[0] = (uint8_t) round;
        float y[BLOCK];
        ggml_ext_fq4_64_dequantize_row(block, y, BLOCK);
        for (int i = 0; i < BLOCK; i++) {
            const float expected = (float) (spec_d(block[0]) * spec_value(block, i));
            CHECK(y[i] == expected || (round == 255 && std::isnan(y[i])), "d %d, weight %d: %g, expected %g", round, i,
                  y[i], expected);
        }
    }
}

// Every code is the nearest of its row, no other row of a sub-block would do better by more than rounding, and neither
// would a neighbouring scale with its best rows and codes.
void test_encoder(const std::vector<float> & x, const float * imatrix) {
    const std::vector<uint8_t> data = quantize(GGML_TYPE_FQ4_64, x, (int64_t) x.size(), imatrix);
    for (size_t ib = 0; ib < x.size() / BLOCK; ib++) {
        const uint8_t * block   = data.data() + BYTES * ib;
        double          found   = 0;
        double          best[3] = {};
        for (int step = -1; step <= 1; step++) {
            const double d = spec_d((uint8_t) (block[0] + step));
            for (int b = 0; b < 4; b++) {
                double least = INFINITY;
                for (int row = 0; row < 16; row++) {
                    double cost = 0;
                    for (int i = 16 * b; i < 16 * b + 16; i++) {
                        const double v     = x[BLOCK * ib + i];
                        double       error = INFINITY;
                        for (int code = 0; code < 16; code++) {
                            error = std::fmin(error, std::fabs(v - d * ggml_ext_fq4_table[row][code]));
                        }
                        cost += (imatrix ? imatrix[BLOCK * ib + i] : 1.0) * error * error;
                        if (step == 0 && row == spec_row(block, i)) {
                            const double chosen = std::fabs(v - d * spec_value(block, i));
                            found += (imatrix ? imatrix[BLOCK * ib + i] : 1.0) * chosen * chosen;
                            CHECK(chosen <= error + 1e-5 * std::fabs(v), "block %zu, weight %d", ib, i);
                        }
                    }
                    least = std::fmin(least, cost);
                }
                best[step + 1] += least;
            }
        }
        CHECK(found <= best[1] * (1 + 1e-4) + 1e-12, "block %zu: rows", ib);
        CHECK(imatrix || found <= std::fmin(best[0], best[2]) * (1 + 1e-4) + 1e-12, "block %zu: scale", ib);
    }
}

void test_encoder() {
    test_encoder(gaussian(64 * 65), nullptr);
    test_encoder(gaussian(64 * 9, 3000.0f), nullptr);
    test_encoder(gaussian(64 * 9, 1e-4f), nullptr);
    std::vector<float> importance = gaussian(2048);
    for (float & v : importance) {
        v = v * v;
    }
    test_encoder(gaussian(2048, 0.02f), importance.data());

    const std::vector<float> x = gaussian(BLOCK);
    const std::vector<float> none(BLOCK, 0.0f);
    CHECK(quantize(GGML_TYPE_FQ4_64, x, BLOCK, none.data()) == quantize(GGML_TYPE_FQ4_64, x, BLOCK, nullptr),
          "importances that are all zero say nothing");
    for (float tiny : { 0.0f, 1e-7f, 4e-6f }) {
        const auto data = quantize(GGML_TYPE_FQ4_64, std::vector<float>(BLOCK, tiny), BLOCK, nullptr);
        CHECK(data[0] == 0, "%g: scale %d", tiny, data[0]);
    }
}

// docs/fq4_64.md has the figures; FQ4's are the reference.
void test_error_against_fq4() {
    const struct {
        const char *       name;
        std::vector<float> x;
    } cases[] = {
        { "Gaussian",     gaussian(1 << 18)   },
        { "Student-t(5)", student_t5(1 << 18) },
    };
    for (const auto & c : cases) {
        const double fq4 = relative_error(GGML_TYPE_FQ4, c.x), fq4_64 = relative_error(GGML_TYPE_FQ4_64, c.x);
        std::printf("%s rows: relative squared error FQ4_64 %.5f, FQ4 %.5f\n", c.name, fq4_64, fq4);
        CHECK(fq4_64 <= fq4, "%s", c.name);
    }
}

void test_refusals() {
    float   x[BLOCK] = { 0 };
    uint8_t data[BYTES];
    CHECK(ggml_ext_type_from_name("FQ4_64") == GGML_TYPE_FQ4_64 && GGML_TYPE_FQ4_64 == 201, "name and id");
    CHECK(ggml_ext_row_size(GGML_TYPE_FQ4_64, 576) == 315, "row size");
    CHECK(ggml_ext_row_size(GGML_TYPE_FQ4_64, 96) == GGML_EXT_E_SHAPE, "half a block");
    for (float bad : { std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                       -std::numeric_limits<float>::infinity(), 2.1e4f, -1e30f }) {
        x[40] = bad;
        CHECK(ggml_ext_quantize(GGML_TYPE_FQ4_64, x, data, 1, BLOCK, nullptr) == GGML_EXT_E_FINITE, "%g", bad);
    }
    x[40] = 2e4f;
    CHECK(ggml_ext_quantize(GGML_TYPE_FQ4_64, x, data, 1, BLOCK, nullptr) == BYTES, "the largest weight");
    data[0] = 255;
    CHECK(!ggml_validate_row_data(GGML_TYPE_FQ4_64, data, BYTES), "NaN");
}

}  // namespace

int main() {
    ggml_cpu_init();
    test_dequantize();
    test_encoder();
    test_error_against_fq4();
    test_refusals();
    return check_done();
}
