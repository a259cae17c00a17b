// The CUDA kernel of GGML_EXT_OP_SCALE_ADD in the emulator, against a plain loop: rows that need not be adjacent, and
// more rows than blocks.

#include "check.h"
#include "scale_add/scale_add.cuh"

#include <vector>

namespace {

void check(int64_t n, int64_t n1, int64_t n2, int64_t n3, unsigned n_blocks) {
    const int64_t      pad    = 3;  // unused floats after each row
    const int64_t      n_rows = n1 * n2 * n3;
    std::vector<float> a(n_rows * (n + pad)), b(n_rows * n), y(n_rows * n, -1e30f);
    for (size_t i = 0; i < a.size(); i++) {
        a[i] = float(i % 101) - 50.0f;
    }
    for (size_t i = 0; i < b.size(); i++) {
        b[i] = float(i % 77) * 0.25f;
    }
    ggml_ext_scale_add_shape shape = {
        { n, n1, n2, n3 },
        {},
        {},
        {}
    };
    const auto strides = [&](int64_t (&nb)[4], int64_t row) {
        nb[0] = 4;
        nb[1] = 4 * row;
        nb[2] = nb[1] * n1;
        nb[3] = nb[2] * n2;
    };
    strides(shape.nb_a, n + pad);
    strides(shape.nb_b, n);
    strides(shape.nb_y, n);
    ggml_ext_cuda_launch(ggml_ext_scale_add_kernel, dim3(n_blocks), dim3(64), 0, nullptr, (const char *) a.data(),
                         (const char *) b.data(), (char *) y.data(), -1.5f, shape);
    for (int64_t row = 0; row < n_rows; row++) {
        for (int64_t i = 0; i < n; i++) {
            CHECK(y[row * n + i] == -1.5f * a[row * (n + pad) + i] + b[row * n + i], "row %ld, element %ld", (long) row,
                  (long) i);
        }
    }
}

}  // namespace

int main() {
    check(1, 1, 1, 1, 1);
    check(33, 7, 3, 2, 5);
    check(200, 5, 2, 1, 10);
    return check_done();
}
