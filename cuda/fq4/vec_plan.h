// Arguments and launch configuration of fq4_vec: plain host code, also for the emulator's test.

#pragma once

#include <algorithm>
#include <cstdint>

constexpr int GGML_EXT_FQ4_VEC_WARPS = 4;  // of a thread block
constexpr int GGML_EXT_FQ4_VEC_ROWS = 4;  // weight rows that a warp works on at a time; with a gate, two of each matrix
constexpr int GGML_EXT_FQ4_VEC_WEIGHTS  = 1024;  // of a row per step of a warp
constexpr int GGML_EXT_FQ4_VEC_MAX_COLS = 8;

// Thread blocks per SM that run at a time as far as registers go.
constexpr int ggml_ext_fq4_vec_per_sm(int n_cols) {
    return n_cols <= 2 ? 4 : n_cols <= 6 ? 3 : 2;
}

// Gated linear units, in ggml's meaning: y = f(gate) * up, or with limits on both.
enum ggml_ext_fq4_vec_glu {
    GGML_EXT_FQ4_VEC_SWIGLU,
    GGML_EXT_FQ4_VEC_GEGLU,
    GGML_EXT_FQ4_VEC_SWIGLU_OAI,
    GGML_EXT_FQ4_VEC_SWIGLU_CLAMP,
};

// y = x * activations: batches of n_rows x n_blocks blocks of weights times a few columns of int8 activations
// (activation.cuh). Strides are in bytes, those of FQ4 weights even; rows of weights are whole blocks one after the other.
//
// Without ids, batch i is i2 = i % ne2, i3 = i / ne2 of dst; weights i2 / ratio2, i3 / ratio3; columns first_col ..
// of ne11 activation rows per batch. With ids (one column), batch i is slot i % ne2 of token i / ne2: expert
// ids[token][slot], activation row slot % ne11 of the token's ne11.
struct ggml_ext_fq4_vec_args {
    const char *   x;
    const char *   gate;  // NULL, or a second matrix of x's strides: y = glu(gate * activations, x * activations)
    const int8_t * codes;
    const float *  scales;
    int            n_act_rows;
    const char *   ids;        // NULL, or int32
    const char *   bias;       // NULL, or f32 added to x * activations: a value per row; one column only
    const char *   gate_bias;  // NULL, or the same for gate
    char *         dst;

    int     n_rows, n_blocks;
    int64_t n_batches;
    int64_t ne2, ratio2, ratio3;
    int64_t ne11, first_col;
    int     nb01;                          // x and gate, below 2^29
    int64_t nb02, nb03;
    int64_t nb1, nb2, nb3;                 // dst: column, i2, i3; slot, token with ids
    int64_t nb_bias1, nb_bias2, nb_bias3;  // both biases: expert (with ids); i2, i3 (without)
    int64_t nb_ids0, nb_ids1;

    ggml_ext_fq4_vec_glu glu;
    float                glu_alpha, glu_limit;
    int                  groups_per_block;  // from the plan
};

struct ggml_ext_fq4_vec_plan {
    unsigned grid_x, grid_y;
    int      groups_per_block;  // a thread block's share: so many groups of GGML_EXT_FQ4_VEC_ROWS rows, adjacent
};

// Thread blocks stay for their whole share of the rows, so that the stream of weights never runs dry between rows. Of
// 1 .. per_sm blocks per SM, takes the number that gives the busiest SM the fewest rows, the larger one of equals.
inline ggml_ext_fq4_vec_plan ggml_ext_fq4_vec_make_plan(int n_rows, bool gate, int64_t n_batches, int n_sm,
                                                        int per_sm) {
    const int             rows   = gate ? GGML_EXT_FQ4_VEC_ROWS / 2 : GGML_EXT_FQ4_VEC_ROWS;
    const int64_t         groups = (n_rows + rows - 1) / rows;
    const int64_t         y      = std::min<int64_t>(n_batches, 65535);
    ggml_ext_fq4_vec_plan best   = {};
    int64_t               least  = INT64_MAX;
    for (int k = per_sm; k >= 1; k--) {
        const int64_t share  = std::max<int64_t>(1, (groups * y + n_sm * k - 1) / (n_sm * k));
        const int64_t blocks = (groups + share - 1) / share;
        const int64_t load   = (blocks * y + n_sm - 1) / n_sm * share;
        if (load < least) {
            least = load;
            best  = { (unsigned) blocks, (unsigned) y, (int) std::min(share, groups) };
        }
    }
    return best;
}
