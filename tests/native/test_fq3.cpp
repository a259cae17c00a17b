// FQ3: layout against the specification's words, encoder against brute force in double. test_fq3_64.cpp is the same for
// FQ3_64.

#define FQ4_REFERENCE_3
#include "check.h"
#include "fq3/fq3.h"
#include "fq3_64/fq3_64.h"
#include "fq4-reference.h"
#include "ggml-cpu.h"
#include "ggml-ext.h"

#include <limits>

namespace {

using fq4_reference::BLOCK;
using fq4_reference::BLOCK_BYTES;
using fq4_reference::TYPE;

std::mt19937 rng(4321);

template <class Distribution> std::vector<float> numbers(int64_t n, Distribution dist, float scale = 1.0f) {
    std::vector<float> x(n);
    for (float & v : x) {
        v = scale * dist(rng);
    }
    return x;
}

std::vector<float> gaussian(int64_t n, float scale = 1.0f) {
    return numbers(n, std::normal_distribution<float>(), scale);
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

void test_table() {
    for (int row = 0; row < 16; row++) {
        for (int code = 0; code < 8; code++) {
            const int value = ggml_ext_fq3_table[row][code];
            CHECK(value >= -127 && value <= 127, "row %d code %d: %d", row, code, value);
            CHECK(code == 0 || value > ggml_ext_fq3_table[row][code - 1], "row %d does not ascend at %d", row, code);
            CHECK(value == -ggml_ext_fq3_table[(row + 8) % 16][7 - code], "row %d is not mirrored at %d", row, code);
        }
    }
}

void test_dequantize() {
    for (int round = 0; round < 255; round++) {
        uint8_t block[BLOCK_BYTES];
        double  d;
        int8_t  q[BLOCK];
        float   y[BLOCK];
        fq4_reference::random_block(rng, std::ldexp(1.0f + (float) (round % 8) / 8, round / 8 - 24), block);
        fq4_reference::decode(block, d, q);
        ggml_get_type_traits(TYPE)->to_float(block, y, BLOCK);
        for (int i = 0; i < BLOCK; i++) {
            CHECK(y[i] == (float) (d * q[i]), "round %d, weight %d: %g, expected %g", round, i, y[i], d * q[i]);
        }
    }
}

// Every code is the nearest of its row, and no other row of a sub-block would do better by more than rounding.
void test_encoder(const std::vector<float> & x, const float * imatrix) {
    const std::vector<uint8_t> data = quantize(TYPE, x, (int64_t) x.size(), imatrix);
    for (size_t i0 = 0; i0 < x.size(); i0 += 16) {
        double d;
        int8_t q[BLOCK];
        fq4_reference::decode(data.data() + i0 / BLOCK * BLOCK_BYTES, d, q);
        double found = 0, least = INFINITY;
        for (int row = 0; row < 16; row++) {
            double cost = 0;
            for (size_t i = i0; i < i0 + 16; i++) {
                double error = INFINITY;
                for (int code = 0; code < 8; code++) {
                    error = std::fmin(error, std::fabs(x[i] - d * ggml_ext_fq3_table[row][code]));
                }
                cost += (imatrix ? imatrix[i] : 1.0) * error * error;
            }
            least = std::fmin(least, cost);
        }
        for (size_t i = i0; i < i0 + 16; i++) {
            const double error = x[i] - d * q[i % BLOCK];
            found += (imatrix ? imatrix[i] : 1.0) * error * error;
        }
        CHECK(found <= least * (1 + 1e-4) + 1e-12, "sub-block %zu: %g, best %g", i0 / 16, found, least);
    }
}

void test_encoder() {
    test_encoder(gaussian(256 * 17), nullptr);
    test_encoder(gaussian(256 * 3, 3000.0f), nullptr);
    test_encoder(gaussian(256 * 3, 1e-4f), nullptr);
    std::vector<float> importance = gaussian(2048);
    for (float & v : importance) {
        v = v * v;
    }
    test_encoder(gaussian(2048, 0.02f), importance.data());

    const std::vector<float> x = gaussian(BLOCK);
    const std::vector<float> none(BLOCK, 0.0f);
    CHECK(quantize(TYPE, x, BLOCK, none.data()) == quantize(TYPE, x, BLOCK, nullptr),
          "importances that are all zero say nothing");
    for (float tiny : { 0.0f, 1e-7f, 2e-6f }) {
        const auto data = quantize(TYPE, std::vector<float>(BLOCK, tiny), BLOCK, nullptr);
        CHECK(fq4_reference::scale(data.data()) == 0, "%g: %g", tiny, fq4_reference::scale(data.data()));
    }
}

// docs/fq3.md has the figures. Q3_K has 3.4375 bits.
void test_error_against_q3_k() {
    const struct {
        const char *       name;
        std::vector<float> x;
    } cases[] = {
        { "Gaussian", gaussian(1 << 18) },
        { "Student-t(5)", numbers(1 << 18, std::student_t_distribution<float>(5.0f)) },
    };
    for (const auto & c : cases) {
        const double ours = relative_error(TYPE, c.x), q3_k = relative_error(GGML_TYPE_Q3_K, c.x);
        std::printf("%s rows: relative squared error %s %.5f, Q3_K %.5f\n", c.name, ggml_type_name(TYPE), ours, q3_k);
        CHECK(ours <= 0.8 * q3_k, "%s", c.name);
    }
}

void test_refusals() {
    float       x[BLOCK] = { 0 };
    uint8_t     data[BLOCK_BYTES];
    const float largest = BLOCK == 64 ? 2e4f : 6e6f;
    CHECK(ggml_ext_type_from_name("FQ3") == 202 && ggml_ext_type_from_name("FQ3_64") == 203, "names and ids");
    CHECK(ggml_ext_row_size(GGML_TYPE_FQ3, 1024) == 424 && ggml_ext_row_size(GGML_TYPE_FQ3_64, 576) == 243, "sizes");
    CHECK(ggml_ext_row_size(TYPE, BLOCK + BLOCK / 2) == GGML_EXT_E_SHAPE, "half a block");
    for (float bad : { std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                       -std::numeric_limits<float>::infinity(), 1.05f * largest, -1e30f }) {
        x[40] = bad;
        CHECK(ggml_ext_quantize(TYPE, x, data, 1, BLOCK, nullptr) == GGML_EXT_E_FINITE, "%g", bad);
    }
    x[40] = largest;
    CHECK(ggml_ext_quantize(TYPE, x, data, 1, BLOCK, nullptr) == (int64_t) BLOCK_BYTES, "the largest weight");
    CHECK(ggml_validate_row_data(TYPE, data, BLOCK_BYTES), "finite");
    std::memset(data, 0xff, fq4_reference::HEADER);
    CHECK(!ggml_validate_row_data(TYPE, data, BLOCK_BYTES), "NaN");
}

}  // namespace

int main() {
    ggml_cpu_init();
    test_table();
    test_dequantize();
    test_encoder();
    test_error_against_q3_k();
    test_refusals();
    return check_done();
}
