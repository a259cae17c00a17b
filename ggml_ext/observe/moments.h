// Sums over the rows of an activation: second moments, their diagonals, the largest values. ggml-ext.h has the layout.

#pragma once

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-ext.h"

#include <cstdint>
#include <vector>

// Rows of n floats each, anywhere in memory, and what each is multiplied by.
struct ggml_ext_rows {
    int64_t                    n = 0;
    std::vector<const float *> at;
    std::vector<float>         scale;
};

// Floats of a moment of n channels in panels.
int64_t ggml_ext_moment_size(int64_t n);

// Sums on the threads of a CPU backend of its own.
class ggml_ext_summer {
  public:
    explicit ggml_ext_summer(int n_threads);

    bool ready() const { return backend != nullptr; }

    // sum of x^2 of each row, unscaled.
    std::vector<double> powers(const ggml_ext_rows & x);

    // after = before + the moment of x in panels; absmax [n], in and out, or null. before null: zeros. Returns 0 or
    // GGML_EXT_E_MEMORY.
    int32_t add_moment(const ggml_ext_rows & x, const float * before, float * after, float * absmax);

    // The same for sums of x^2 [n].
    int32_t add_diagonal(const ggml_ext_rows & x, const float * before, float * after);

  private:
    bool compute(ggml_cgraph * graph);
    bool call(ggml_custom_op_t op, void * its);

    ggml_backend_ptr backend;
    ggml_gallocr_ptr allocator;
};
