// FQ4 or FQ4_64 matrix times 1 to 8 columns: the launcher.

#pragma once

#include "ggml.h"
#include "vec_plan.h"

struct ggml_backend_cuda_context;

// n_cols: 1 .. GGML_EXT_FQ4_VEC_MAX_COLS; 1 with a gate, biases or ids. Sets args.groups_per_block.
void ggml_ext_cuda_fq4_vec(ggml_backend_cuda_context & ctx, ggml_type type, int n_cols, ggml_ext_fq4_vec_args args);
