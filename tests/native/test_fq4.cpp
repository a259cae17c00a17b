// FQ4: layout, encoder and dot products against independent computations in double and int64.

#include "check.h"
#include "fq4/cpu/fq4.h"
#include "fq4/fq4.h"
#include "ggml-cpu.h"
#include "ggml-ext.h"

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

namespace {

std::mt19937 rng(1234);

// The format as docs/gguf.md words it, written anew: what breaks if a nibble moves.
int spec_row(const uint8_t * block, int weight) {
    const int     sub_block = weight / 16;
    const uint8_t byte      = block[2 + sub_block / 2];
    return sub_block % 2 ? byte / 16 : byte % 16;
}

int spec_code(const uint8_t * block, int weight) {
    const uint8_t byte = block[10 + weight / 128 * 64 + weight % 64];
    return weight % 128 >= 64 ? byte / 16 : byte % 16;
}

int spec_value(const uint8_t * block, int weight) {
    return ggml_ext_fq4_table[spec_row(block, weight)][spec_code(block, weight)];
}

double spec_d(const uint8_t * block) {
    ggml_fp16_t d;
    std::memcpy(&d, block, 2);
    return ggml_fp16_to_fp32(d);
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

std::vector<uint8_t> quantize(int32_t type, const std::vector<float> & x, int64_t n_per_row, const float * imatrix) {
    const int64_t        nrows = (int64_t) x.size() / n_per_row;
    std::vector<uint8_t> out(nrows * ggml_ext_row_size(type, n_per_row));
    const int64_t        size = ggml_ext_quantize(type, x.data(), out.data(), nrows, n_per_row, imatrix);
    CHECK(size == (int64_t) out.size(), "%lld bytes", (long long) size);
    return out;
}

double relative_error(int32_t type, const std::vector<float> & x) {
    const int64_t              n    = 4096;
    const std::vector<uint8_t> data = quantize(type, x, n, nullptr);
    std::vector<float>         y(x.size());
    CHECK(ggml_ext_dequantize(type, data.data(), y.data(), (int64_t) x.size() / n, n) == (int64_t) x.size(), "size");
    double num = 0, den = 0;
    for (size_t i = 0; i < x.size(); i++) {
        num += (double) (x[i] - y[i]) * (x[i] - y[i]);
        den += (double) x[i] * x[i];
    }
    return num / den;
}

void test_table() {
    for (int row = 0; row < 16; row++) {
        for (int code = 0; code < 16; code++) {
            const int value = ggml_ext_fq4_table[row][code];
            CHECK(value >= -127 && value <= 127, "row %d code %d: %d", row, code, value);
            CHECK(code == 0 || value > ggml_ext_fq4_table[row][code - 1], "row %d does not ascend at %d", row, code);
            CHECK(value == -ggml_ext_fq4_table[(row + 8) % 16][15 - code], "row %d is not mirrored at %d", row, code);
        }
    }
}

void test_dequantize() {
    uint8_t block[138];
    for (int round = 0; round < 50; round++) {
        for (uint8_t & byte : block) {
            byte = (uint8_t) rng();
        }
        const ggml_fp16_t d = ggml_fp32_to_fp16(0.001f * (float) (rng() % 1000));
        std::memcpy(block, &d, 2);
        float y[256];
        ggml_ext_fq4_dequantize_row(block, y, 256);
        for (int i = 0; i < 256; i++) {
            const float expected = (float) (spec_d(block) * spec_value(block, i));
            CHECK(y[i] == expected, "weight %d: %g, expected %g", i, y[i], expected);
        }
    }
}

// Every code is the nearest of its row, and no other row of a sub-block would do better by more than
// rounding.
void test_encoder_is_nearest(const std::vector<float> & x, const float * imatrix) {
    const std::vector<uint8_t> data = quantize(GGML_TYPE_FQ4, x, (int64_t) x.size(), imatrix);
    for (size_t ib = 0; ib < x.size() / 256; ib++) {
        const uint8_t * block = data.data() + 138 * ib;
        const double    d     = spec_d(block);
        for (int b = 0; b < 16; b++) {
            double cost[16] = {};
            for (int i = 16 * b; i < 16 * b + 16; i++) {
                const double v = x[256 * ib + i];
                for (int row = 0; row < 16; row++) {
                    double best = 1e300;
                    for (int code = 0; code < 16; code++) {
                        best = std::fmin(best, std::fabs(v - d * ggml_ext_fq4_table[row][code]));
                    }
                    cost[row] += (imatrix ? imatrix[256 * ib + i] : 1.0) * best * best;
                    if (row == spec_row(block, i)) {
                        const double error = std::fabs(v - d * spec_value(block, i));
                        CHECK(error <= best + 1e-5 * std::fabs(v), "block %zu weight %d: %g, nearest %g", ib, i, error,
                              best);
                    }
                }
            }
            for (int row = 0; row < 16; row++) {
                CHECK(cost[spec_row(block, 16 * b)] <= cost[row] * (1 + 1e-4) + 1e-12, "block %zu sub-block %d", ib, b);
            }
        }
    }
}

void test_encoder() {
    test_encoder_is_nearest(gaussian(4096), nullptr);
    test_encoder_is_nearest(student_t5(4096), nullptr);
    std::vector<float> importance = gaussian(2048);
    for (float & v : importance) {
        v = v * v;
    }
    importance[7] = 0.0f;
    test_encoder_is_nearest(gaussian(2048, 0.02f), importance.data());
    test_encoder_is_nearest(gaussian(512, 30000.0f), nullptr);
    test_encoder_is_nearest(gaussian(512, 1e-5f), nullptr);

    // Columns that were never active: their sub-blocks still get a fitting row.
    std::vector<float> mostly_zero(256, 0.0f);
    mostly_zero[0]                 = 1.0f;
    const std::vector<float> x     = gaussian(256);
    const std::vector<float> none  = std::vector<float>(256, 0.0f);
    const auto               plain = quantize(GGML_TYPE_FQ4, x, 256, nullptr);
    CHECK(quantize(GGML_TYPE_FQ4, x, 256, none.data()) == plain, "importances that are all zero say nothing");
    const auto         weighted = quantize(GGML_TYPE_FQ4, x, 256, mostly_zero.data());
    std::vector<float> decoded(256);
    ggml_ext_dequantize(GGML_TYPE_FQ4, weighted.data(), decoded.data(), 1, 256);
    for (int i = 0; i < 256; i++) {
        CHECK(std::fabs(x[i] - decoded[i]) < 0.6, "weight %d: %g became %g", i, x[i], decoded[i]);
    }

    const std::vector<float>   zeros(256, 0.0f);
    const std::vector<uint8_t> data = quantize(GGML_TYPE_FQ4, zeros, 256, nullptr);
    std::vector<float>         y(256, 1.0f);
    ggml_ext_dequantize(GGML_TYPE_FQ4, data.data(), y.data(), 1, 256);
    CHECK(y == zeros, "zeros stay zeros");
}

void test_importance_helps() {
    std::vector<float> x          = gaussian(256 * 64);
    std::vector<float> importance = gaussian(256);
    for (float & v : importance) {
        v = std::exp(2.0f * v);
    }
    double error[2] = {};
    for (int with = 0; with < 2; with++) {
        const std::vector<uint8_t> data = quantize(GGML_TYPE_FQ4, x, 256, with ? importance.data() : nullptr);
        std::vector<float>         y(x.size());
        ggml_ext_dequantize(GGML_TYPE_FQ4, data.data(), y.data(), 64, 256);
        for (size_t i = 0; i < x.size(); i++) {
            error[with] += importance[i % 256] * std::pow((double) x[i] - y[i], 2);
        }
    }
    CHECK(error[1] < 0.9 * error[0], "weighted error %g with importances, %g without", error[1], error[0]);
}

void test_error_against_q4_K() {
    const struct {
        const char *       name;
        std::vector<float> x;
    } cases[] = {
        { "Gaussian",     gaussian(1 << 18)   },
        { "Student-t(5)", student_t5(1 << 18) },
    };
    for (const auto & c : cases) {
        const double fq4  = relative_error(GGML_TYPE_FQ4, c.x);
        const double q4_K = relative_error(GGML_TYPE_Q4_K, c.x);
        std::printf("%s rows: relative squared error FQ4 %.5f, Q4_K %.5f\n", c.name, fq4, q4_K);
        CHECK(fq4 <= q4_K, "%s", c.name);
    }
}

// Activations small enough that the whole row's sum is an exact float, scales 1: every path must give
// the integer itself, at every row length and alignment.
void test_dot_exact() {
    for (int p = 0; p < ggml_ext_fq4_kernels.n_paths; p++) {
        const ggml_ext_fq4_path & path = *ggml_ext_fq4_kernels.paths[p];
        std::printf("path %s: %s\n", path.name, path.available() ? "checked" : "not available on this processor");
        if (!path.available()) {
            continue;
        }
        for (int blocks = 1; blocks <= 33; blocks++) {
            for (int offset = 0; offset < 64; offset += blocks < 4 ? 2 : 22) {
                std::vector<uint8_t>          xbuf(138 * blocks + offset);
                std::vector<ggml_ext_fq4_act> act(blocks);
                uint8_t *                     x   = xbuf.data() + offset;
                int64_t                       sum = 0;
                for (int ib = 0; ib < blocks; ib++) {
                    const int range = blocks == 1 ? 127 : 7;
                    for (int i = 0; i < 138; i++) {
                        x[138 * ib + i] = (uint8_t) rng();
                    }
                    const ggml_fp16_t one = ggml_fp32_to_fp16(1.0f);
                    std::memcpy(x + 138 * ib, &one, 2);
                    ggml_ext_fq4_act & y = act[ib];
                    y.d                  = 1.0f;
                    for (int i = 0; i < 256; i++) {
                        y.q[i] = (int8_t) ((int) (rng() % (2 * range + 1)) - range);
                        y.start -= 128 * y.q[i];
                        sum += (int64_t) spec_value(x + 138 * ib, i) * y.q[i];
                    }
                }
                const void * column = act.data();
                float        s      = 0.0f;
                float *      out    = &s;
                path.dots(1, blocks, x, 0, 1, &column, &out);
                CHECK((int64_t) s == sum && (float) sum == s, "%s, %d blocks, offset %d: %.1f, expected %lld",
                      path.name, blocks, offset, s, (long long) sum);
            }
        }
    }
}

void test_dot_extremes() {
    // The largest sums: every weight at its largest, every activation +-127.
    uint8_t block[138];
    std::memset(block, 0x77, 10);  // row 7
    const ggml_fp16_t one = ggml_fp32_to_fp16(1.0f);
    std::memcpy(block, &one, 2);
    std::memset(block + 10, 0xff, 128);  // code 15
    for (int sign : { -1, 1 }) {
        ggml_ext_fq4_act y;
        y.d     = 1.0f;
        y.start = -128 * sign * 127 * 256;
        std::memset(y.q, sign * 127, sizeof(y.q));
        const void * column = &y;
        for (int p = 0; p < ggml_ext_fq4_kernels.n_paths; p++) {
            float   s   = 0.0f;
            float * out = &s;
            if (ggml_ext_fq4_kernels.paths[p]->available()) {
                ggml_ext_fq4_kernels.paths[p]->dots(1, 1, block, 0, 1, &column, &out);
                CHECK(s == (float) (sign * ggml_ext_fq4_table[7][15] * 127 * 256), "%s: %g",
                      ggml_ext_fq4_kernels.paths[p]->name, s);
            }
        }
    }
}

void test_api() {
    float   x[256] = { 0 };
    float   y[256];
    uint8_t data[256];
    CHECK(ggml_ext_type_from_name("FQ4") == GGML_TYPE_FQ4, "case is ignored");
    CHECK(ggml_ext_type_from_name("q4_k") == GGML_TYPE_Q4_K, "upstream's types too");
    CHECK(ggml_ext_type_from_name("nonsense") == GGML_EXT_E_TYPE, "unknown name");
    CHECK(ggml_ext_type_from_name(nullptr) == GGML_EXT_E_TYPE, "NULL name");
    CHECK(std::strcmp(ggml_ext_type_name(GGML_TYPE_FQ4), "fq4") == 0, "name");
    CHECK(ggml_ext_type_name(199) == nullptr && ggml_ext_type_name(-1) == nullptr, "holes have no name");
    CHECK(ggml_ext_row_size(GGML_TYPE_FQ4, 512) == 276, "row size");
    CHECK(ggml_ext_row_size(GGML_TYPE_FQ4, 128) == GGML_EXT_E_SHAPE, "half a block");
    CHECK(ggml_ext_row_size(150, 256) == GGML_EXT_E_TYPE, "hole");
    CHECK(ggml_ext_quantize(GGML_TYPE_Q8_K, x, data, 1, 256, nullptr) == GGML_EXT_E_TYPE, "activation type");
    CHECK(ggml_ext_quantize(GGML_TYPE_IQ2_XXS, x, data, 1, 256, nullptr) == GGML_EXT_E_TYPE, "needs importances");
    CHECK(ggml_ext_needs_imatrix(GGML_TYPE_IQ2_XXS) == 1 && ggml_ext_needs_imatrix(GGML_TYPE_FQ4) == 0, "imatrix");
    CHECK(ggml_ext_quantize(GGML_TYPE_FQ4, x, data, 0, 256, nullptr) == 0, "no rows");
    CHECK(ggml_ext_dequantize(GGML_TYPE_FQ4, data, y, 1, 100) == GGML_EXT_E_SHAPE, "shape");
    for (float bad : { std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                       -std::numeric_limits<float>::infinity(), 7e6f, -1e30f }) {
        x[200] = bad;
        CHECK(ggml_ext_quantize(GGML_TYPE_FQ4, x, data, 1, 256, nullptr) == GGML_EXT_E_FINITE, "%g", bad);
    }
    float result;
    CHECK(ggml_ext_cpu_dot(GGML_TYPE_FQ4, "no such path", data, y, 256, &result) == GGML_EXT_E_TYPE, "path");
    CHECK(ggml_ext_cpu_dot(GGML_TYPE_FQ4, nullptr, data, y, 100, &result) == GGML_EXT_E_SHAPE, "shape");
    CHECK(std::strstr(ggml_ext_cpu_paths(), "generic") != nullptr, "%s", ggml_ext_cpu_paths());
}

void test_dot_api() {
    const std::vector<float>   w    = gaussian(1024, 0.02f);
    const std::vector<float>   x    = gaussian(1024);
    const std::vector<uint8_t> data = quantize(GGML_TYPE_FQ4, w, 1024, nullptr);
    std::vector<float>         y(1024);
    ggml_ext_dequantize(GGML_TYPE_FQ4, data.data(), y.data(), 1, 1024);
    double expected = 0, norm = 0;
    for (int i = 0; i < 1024; i++) {
        expected += (double) y[i] * x[i];
        norm += std::fabs((double) y[i] * x[i]);
    }
    float result = 0.0f;
    CHECK(ggml_ext_cpu_dot(GGML_TYPE_FQ4, nullptr, data.data(), x.data(), 1024, &result) == 0, "status");
    CHECK(std::fabs(result - expected) < 0.005 * norm, "%g, expected %g", result, expected);
}

}  // namespace

int main() {
    ggml_cpu_init();
    test_table();
    test_dequantize();
    test_encoder();
    test_importance_helps();
    test_error_against_q4_K();
    test_dot_exact();
    test_dot_extremes();
    test_api();
    test_dot_api();
    return check_done();
}
