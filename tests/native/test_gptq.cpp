// GPTQ and coordinate descent against plain loops in double: errors, costs and what the encoded blocks decode to.
// tests/python/methods/test_rounding.py compares the choices themselves with a dense implementation.

#include "check.h"
#include "fq4/fq4.h"
#include "fq4_64/fq4_64.h"
#include "ggml-ext.h"

#include <cmath>
#include <random>
#include <vector>

namespace {

std::mt19937 rng(7);

using floats = std::vector<float>;

floats normal(size_t n, float scale) {
    std::normal_distribution<float> draw(0.0f, scale);
    floats                          values(n);
    for (float & value : values) {
        value = draw(rng);
    }
    return values;
}

// Upper triangular with a dominant diagonal, as a Cholesky factor of an inverse Hessian is.
floats factor(int n) {
    floats u = normal((size_t) n * n, 0.3f / std::sqrt((float) n));
    for (int i = 0; i < n; i++) {
        for (int j = 0; j < i; j++) {
            u[(size_t) i * n + j] = 0.0f;
        }
        u[(size_t) i * n + i] = 0.5f + std::fabs(u[(size_t) i * n + i]);
    }
    return u;
}

floats inverse_of_upper(const floats & u, int n) {
    floats inverse((size_t) n * n, 0.0f);
    for (int column = 0; column < n; column++) {
        for (int i = column; i >= 0; i--) {
            double sum = i == column ? 1.0 : 0.0;
            for (int k = i + 1; k <= column; k++) {
                sum -= (double) u[(size_t) i * n + k] * inverse[(size_t) k * n + column];
            }
            inverse[(size_t) i * n + column] = (float) (sum / u[(size_t) i * n + i]);
        }
    }
    return inverse;
}

// e U = w - q, whatever was chosen: the errors that were passed on are those of the result.
void check_errors(const char * what, const float * w, const float * q, const float * err, const floats & u, int n,
                  float cost) {
    double sum = 0.0;
    for (int k = 0; k < n; k++) {
        double passed = 0.0;
        for (int j = 0; j <= k; j++) {
            passed += (double) err[j] * u[(size_t) j * n + k];
        }
        CHECK(std::fabs(passed - (w[k] - q[k])) < 1e-4, "%s: column %d: %g, not %g", what, k, passed, w[k] - q[k]);
        sum += (double) err[k] * err[k];
    }
    CHECK(std::fabs(sum - cost) < 1e-4 * sum + 1e-12, "%s: cost %g, not %g", what, cost, sum);
}

// A type whose scale and table rows are chosen with the codes.
struct joint_type {
    const char * name;
    int          n;      // weights per block
    int64_t      bytes;  // per block
    void (*decode)(const void * block, float * q, int64_t n);
    int32_t (*round)(int64_t nrows, const float * w, const float * u, const float * u_inv, void * dst, int64_t stride,
                     float * err, float * cost);
    float too_large;
};

int32_t round_fq4_64(int64_t nrows, const float * w, const float * u, const float *, void * dst, int64_t stride,
                     float * err, float * cost) {
    return ggml_ext_gptq_fq4_64(nrows, w, u, dst, stride, err, cost);
}

const joint_type joint_types[] = {
    { "fq4",    QK_FQ4,    138, ggml_ext_fq4_dequantize_row,    ggml_ext_gptq_fq4, 6.1e6f },
    { "fq4_64", QK_FQ4_64, 35,  ggml_ext_fq4_64_dequantize_row, round_fq4_64,      2.1e4f },
};

void test_joint(const joint_type & type, int nrows, int64_t stride) {
    const int            n     = type.n;
    floats               w     = normal((size_t) nrows * n, 0.05f);
    const floats         u     = factor(n);
    const floats         u_inv = inverse_of_upper(u, n);
    std::vector<uint8_t> blocks(nrows * stride, 0xAA);
    floats               err(w.size());
    floats               cost(nrows);
    for (int j = 0; j < n; j++) {
        w[j] = 0.0f;  // a block of zeros
    }
    auto round = [&](int rows) {
        return type.round(rows, w.data(), u.data(), u_inv.data(), blocks.data(), stride, err.data(), cost.data());
    };
    CHECK(round(nrows) == 0, "%s: %d rows", type.name, nrows);
    for (int row = 0; row < nrows; row++) {
        floats q(n);
        type.decode(blocks.data() + row * stride, q.data(), n);
        check_errors(type.name, w.data() + (size_t) row * n, q.data(), err.data() + (size_t) row * n, u, n, cost[row]);
        for (int64_t i = type.bytes; i < stride; i++) {
            CHECK(blocks[row * stride + i] == 0xAA, "%s: row %d: byte %d behind the block was written", type.name, row,
                  (int) i);
        }
    }
    CHECK(cost[0] == 0.0f, "%s: zeros cost %g", type.name, cost[0]);
    for (float bad : { NAN, INFINITY, type.too_large, -type.too_large }) {
        w[n - 1] = bad;
        CHECK(round(1) == GGML_EXT_E_FINITE, "%s: %g", type.name, bad);
    }
    w[n - 1] = 1e-7f;  // too small for any scale
    CHECK(round(1) == 0 && cost[0] == 0.0f && err[n - 1] == 0.0f, "%s: a tiny weight costs %g", type.name, cost[0]);
}

struct levels {
    floats               books, scale, offset;
    std::vector<uint8_t> book, chosen;
    ggml_ext_grid        grid;

    levels(int nrows, int n, int group, int n_levels, int n_books) :
        books(normal((size_t) n_books * n_levels, 1.0f)), scale(normal((size_t) nrows * n / group, 1.0f)),
        offset(normal((size_t) nrows * n / group, 1.0f)), book((size_t) nrows * n / group), chosen((size_t) nrows * n),
        grid{ n, group, n_levels, n_books, books.data(), scale.data(), offset.data(), book.data() } {
        for (int b = 0; b < n_books; b++) {
            for (int i = 1; i < n_levels; i++) {
                float & value = books[(size_t) b * n_levels + i];
                value         = books[(size_t) b * n_levels + i - 1] + std::fabs(value) + 0.01f;
            }
        }
        for (size_t i = 0; i < book.size(); i++) {
            book[i] = (uint8_t) (i % n_books);
        }
        scale[0] = 0.0f;  // a group that can only be its offset
    }

    float value(int row, int j) const {
        const size_t g = ((size_t) row * grid.n + j) / grid.group;
        return scale[g] * books[(size_t) book[g] * grid.n_levels + chosen[(size_t) row * grid.n + j]] + offset[g];
    }
};

void test_grid(int nrows, int n, int group, int n_levels, int n_books) {
    levels       at(nrows, n, group, n_levels, n_books);
    const floats w = normal((size_t) nrows * n, 1.0f);
    const floats u = factor(n);
    floats       err(w.size());
    floats       cost(nrows);
    CHECK(ggml_ext_gptq_grid(&at.grid, nrows, w.data(), u.data(), at.chosen.data(), err.data(), cost.data()) == 0,
          "grid");
    for (int row = 0; row < nrows; row++) {
        floats q(n);
        for (int j = 0; j < n; j++) {
            q[j] = at.value(row, j);
        }
        check_errors("grid", w.data() + (size_t) row * n, q.data(), err.data() + (size_t) row * n, u, n, cost[row]);
    }

    floats h((size_t) n * n, 0.0f);  // U^T U, symmetric and positive definite
    for (int i = 0; i < n; i++) {
        for (int j = 0; j < n; j++) {
            for (int k = 0; k < n; k++) {
                h[(size_t) i * n + j] += u[(size_t) k * n + i] * u[(size_t) k * n + j];
            }
        }
    }
    auto error = [&](int row) {
        double sum = 0.0;
        for (int i = 0; i < n; i++) {
            for (int j = 0; j < n; j++) {
                sum += (double) (at.value(row, i) - w[(size_t) row * n + i]) * h[(size_t) i * n + j] *
                       (at.value(row, j) - w[(size_t) row * n + j]);
            }
        }
        return sum;
    };
    std::vector<double> before(nrows);
    for (int row = 0; row < nrows; row++) {
        before[row] = error(row);
    }
    CHECK(ggml_ext_descend(&at.grid, nrows, w.data(), h.data(), 20, at.chosen.data()) >= 0, "descend");
    for (int row = 0; row < nrows; row++) {
        CHECK(error(row) <= before[row] * (1 + 1e-5) + 1e-9, "row %d: %g after %g", row, error(row), before[row]);
    }
}

void test_refusals() {
    levels at(1, 16, 16, 4, 1);
    floats w(16), u(256), err(16), cost(1);
    for (ggml_ext_grid bad : {
             ggml_ext_grid{ 16, 5,  4,  1, nullptr, nullptr, nullptr, nullptr },
             ggml_ext_grid{ 16, 16, 1,  1, nullptr, nullptr, nullptr, nullptr },
             ggml_ext_grid{ 16, 16, 65, 1, nullptr, nullptr, nullptr, nullptr },
             ggml_ext_grid{ 16, 16, 4,  0, nullptr, nullptr, nullptr, nullptr }
    }) {
        CHECK(ggml_ext_gptq_grid(&bad, 1, w.data(), u.data(), at.chosen.data(), err.data(), cost.data()) ==
                  GGML_EXT_E_SHAPE,
              "gptq");
        CHECK(ggml_ext_descend(&bad, 1, w.data(), u.data(), 1, at.chosen.data()) == GGML_EXT_E_SHAPE, "descend");
    }
    for (const joint_type & type : joint_types) {
        const auto round = [&](int64_t nrows, int64_t stride) {
            return type.round(nrows, w.data(), u.data(), u.data(), at.chosen.data(), stride, err.data(), cost.data());
        };
        CHECK(round(1, type.bytes - 1) == GGML_EXT_E_SHAPE, "%s: stride", type.name);
        CHECK(round(-1, type.bytes) == GGML_EXT_E_SHAPE, "%s: rows", type.name);
    }
}

}  // namespace

int main() {
    for (int nrows : { 1, 3, 17 }) {
        for (const joint_type & type : joint_types) {
            test_joint(type, nrows, type.bytes + 6 * (nrows % 2));
        }
        test_grid(nrows, 48, 16, 16, 3);
        test_grid(nrows, 33, 11, 64, 1);
        test_grid(nrows, 5, 1, 2, 2);
        test_grid(nrows, 96, 32, 15, 256);
    }
    test_refusals();
    return check_done();
}
