// The matrix-vector kernel of FQ4, or of FQ4_64, in the emulator, with the launch configuration that a device of a few SMs would get,
// against sums in double over weights decoded anew. Weights lie between NaN blocks at every address modulo 16 that blocks start at;
// outputs are poisoned and their padding is checked.
//
// Would break it: a wrong nibble, table row or order of activations (every bit of the random blocks counts), an item of
// another row or step (all values differ), a missing wait or barrier (the emulator's order of threads), reading a block
// beyond the row (NaN), writing a row beyond the last one (poison in the padding), a wrong expert, batch, column, bias
// or unit.

#include "check.h"
#include "fq4-layout.h"
#include "fq4/vec.cuh"

#include <memory>

namespace {

using fq4_reference::BLOCK;
using fq4_reference::BLOCK_BYTES;
using fq4_reference::layout;
using fq4_reference::Product;
using fq4_reference::remainder_of;
using fq4_reference::Rows;

constexpr float POISON = -1e30f;

std::mt19937 rng(7);

int random_int(int n) {
    return int(rng() % unsigned(n));
}

// Bytes at an address with the given remainder modulo 16, all 0xff (NaN scales) until they are written. The kernel may
// read the rest of a 16-byte unit, never more.
struct Bytes {
    std::unique_ptr<char, decltype(&std::free)> memory;
    char *                                      data;

    Bytes(size_t size, int remainder) :
        memory(static_cast<char *>(std::aligned_alloc(16, (size + 16 + 15) / 16 * 16)), &std::free),
        data(memory.get() + remainder) {
        std::memset(memory.get(), 0xff, (size + 16 + 15) / 16 * 16);
    }
};

struct Weights {
    Bytes   bytes;
    Rows    rows;
    int64_t nb1;

    Weights(int64_t n_rows, int64_t n_blocks, int gap_blocks, int remainder) :
        bytes(n_rows * (n_blocks + gap_blocks) * BLOCK_BYTES, remainder), nb1((n_blocks + gap_blocks) * BLOCK_BYTES) {
        rows.n_blocks = n_blocks;
        rows.d.resize(n_rows * n_blocks);
        rows.q.resize(n_rows * n_blocks * BLOCK);
        for (int64_t i = 0; i < n_rows * n_blocks; i++) {
            uint8_t * block = (uint8_t *) bytes.data + i / n_blocks * nb1 + i % n_blocks * BLOCK_BYTES;
            fq4_reference::random_block(rng, 0.001f * (1 + random_int(100)), block);
            fq4_reference::decode(block, rows.d[i], &rows.q[i * BLOCK]);
        }
    }
};

struct Activations {
    Rows               rows;
    std::vector<float> scales;
    int8_t *           codes;
    Bytes              bytes;

    Activations(int64_t n_rows, int64_t n_blocks) : bytes(n_rows * n_blocks * BLOCK, 0) {
        rows.n_blocks = n_blocks;
        rows.d.resize(n_rows * n_blocks);
        rows.q.resize(n_rows * n_blocks * BLOCK);
        scales.resize(n_rows * n_blocks);
        for (int8_t & q : rows.q) {
            q = int8_t(random_int(255) - 127);
        }
        for (int64_t i = 0; i < n_rows * n_blocks; i++) {
            const float scale                            = 0.01f * float(1 + random_int(100));
            rows.d[i]                                    = scale;
            scales[i % n_blocks * n_rows + i / n_blocks] = scale;
        }
        codes = (int8_t *) bytes.data;
        std::memcpy(codes, rows.q.data(), rows.q.size());
    }
};

struct Case {
    int  n_rows, n_blocks, n_cols;
    int  n_sm = 1;
    bool gate = false, bias = false;
    int  glu  = GGML_EXT_FQ4_VEC_SWIGLU;
    int  ne02 = 1, ne03 = 1, ratio2 = 1, ratio3 = 1;
    int  n_experts = 0, n_used = 0, n_tokens = 0;
    bool shared_input = false;           // of a token's experts
    int  gap_blocks = 0, remainder = 0;  // see remainder_of
    int  first_col = 0, more_cols = 0;   // columns that this launch leaves alone
};

template <int N_COLS, bool GATE> void launch(const ggml_ext_fq4_vec_plan & plan, const ggml_ext_fq4_vec_args & args) {
    ggml_ext_cuda_launch(ggml_ext_fq4_vec_kernel<layout, N_COLS, GATE>, dim3(plan.grid_x, plan.grid_y),
                         dim3(ggml_ext::fq4_vec_threads), sizeof(ggml_ext::fq4_vec_shared<N_COLS>), nullptr, args);
}

void launch(int n_cols, const ggml_ext_fq4_vec_plan & plan, const ggml_ext_fq4_vec_args & args) {
    switch (n_cols) {
        case 1:
            return args.gate ? launch<1, true>(plan, args) : launch<1, false>(plan, args);
        case 2:
            return launch<2, false>(plan, args);
        case 3:
            return launch<3, false>(plan, args);
        case 5:
            return launch<5, false>(plan, args);
        case 8:
            return launch<8, false>(plan, args);
    }
    CHECK(false, "no instance");
}

double glu_reference(int op, double gate, double up, double alpha, double limit) {
    switch (op) {
        case GGML_EXT_FQ4_VEC_SWIGLU:
            return gate / (1 + std::exp(-gate)) * up;
        case GGML_EXT_FQ4_VEC_GEGLU:
            return gate * 0.5 * (1 + std::tanh(std::sqrt(2 / M_PI) * (gate + 0.044715 * gate * gate * gate))) * up;
        case GGML_EXT_FQ4_VEC_SWIGLU_OAI:
            gate = std::min(gate, limit);
            return gate / (1 + std::exp(-alpha * gate)) * (1 + std::max(-limit, std::min(up, limit)));
        default:
            gate = std::min(gate, limit);
            return gate / (1 + std::exp(-gate)) * std::max(-limit, std::min(up, limit));
    }
}

void check(const Case & t) {
    const bool    id        = t.n_experts > 0;
    const int64_t ne2       = id ? t.n_used : int64_t(t.ne02) * t.ratio2;
    const int64_t n_batches = id ? int64_t(t.n_used) * t.n_tokens : ne2 * t.ne03 * t.ratio3;
    const int64_t matrices  = id ? t.n_experts : int64_t(t.ne02) * t.ne03;
    const int64_t ne11      = id ? (t.shared_input ? 1 : t.n_used) : t.first_col + t.n_cols + t.more_cols;
    const int64_t act_rows  = id ? ne11 * t.n_tokens : ne11 * n_batches;

    const Weights      x(matrices * t.n_rows, t.n_blocks, t.gap_blocks, remainder_of(t.remainder));
    const Weights      gate(matrices * t.n_rows, t.n_blocks, t.gap_blocks, remainder_of(t.remainder + 7));
    const Activations  acts(act_rows, t.n_blocks);
    const int64_t      pad   = 5;                                  // unused floats after each column of dst
    const int64_t      nb1   = (t.n_rows + pad) * 4;
    const int64_t      n_out = id ? n_batches : n_batches * ne11;  // columns of dst
    std::vector<float> dst(n_out * (t.n_rows + pad), POISON);
    std::vector<float> bias(std::max(matrices, n_batches) * t.n_rows), gate_bias(bias.size());
    std::vector<int>   ids(2 * n_batches, -1);  // every second one counts
    for (size_t i = 0; i < bias.size(); i++) {
        bias[i]      = float(random_int(1000) - 500);
        gate_bias[i] = float(random_int(1000) - 500);
    }
    for (int64_t i = 0; id && i < n_batches; i++) {
        ids[2 * i] = random_int(t.n_experts);
    }

    ggml_ext_fq4_vec_args args = {};
    args.x                     = x.bytes.data;
    args.gate                  = t.gate ? gate.bytes.data : nullptr;
    args.codes                 = acts.codes;
    args.scales                = acts.scales.data();
    args.n_act_rows            = act_rows;
    args.ids                   = id ? (const char *) ids.data() : nullptr;
    args.bias                  = t.bias ? (const char *) bias.data() : nullptr;
    args.gate_bias             = t.bias && t.gate ? (const char *) gate_bias.data() : nullptr;
    args.dst                   = (char *) dst.data();
    args.n_rows                = t.n_rows;
    args.n_blocks              = t.n_blocks;
    args.n_batches             = n_batches;
    args.ne2                   = ne2;
    args.ratio2                = t.ratio2;
    args.ratio3                = t.ratio3;
    args.ne11                  = ne11;
    args.first_col             = t.first_col;
    args.nb01                  = x.nb1;
    args.nb02                  = x.nb1 * t.n_rows;
    args.nb03                  = args.nb02 * t.ne02;
    args.nb1                   = nb1;
    args.nb2                   = id ? nb1 * t.n_used : nb1 * ne11;
    args.nb3                   = args.nb2 * ne2;
    args.nb_bias1              = t.n_rows * 4;
    args.nb_bias2              = t.n_rows * 4;
    args.nb_bias3              = args.nb_bias2 * ne2;
    args.nb_ids0               = 8;
    args.nb_ids1               = 8 * t.n_used;
    args.glu                   = ggml_ext_fq4_vec_glu(t.glu);
    args.glu_alpha             = 1.702f;
    args.glu_limit             = 7.0f;
    const auto plan =
        ggml_ext_fq4_vec_make_plan(t.n_rows, t.gate, n_batches, t.n_sm, ggml_ext_fq4_vec_per_sm(t.n_cols));
    args.groups_per_block = plan.groups_per_block;
    launch(t.n_cols, plan, args);

    std::vector<bool> written(dst.size());
    for (int64_t b = 0; b < n_batches; b++) {
        const int64_t i2 = b % ne2, i3 = b / ne2;
        const int64_t matrix = id ? ids[2 * b] : i2 / t.ratio2 + i3 / t.ratio3 * t.ne02;
        for (int c = 0; c < t.n_cols; c++) {
            const int64_t act = id ? i3 * ne11 + (t.shared_input ? 0 : i2) : b * ne11 + t.first_col + c;
            const int64_t out = id ? b : b * ne11 + t.first_col + c;
            for (int r = 0; r < t.n_rows; r++) {
                const int64_t bias_at  = (id ? matrix : b) * t.n_rows + r;
                const Product up       = fq4_reference::multiply(x.rows, matrix * t.n_rows + r, acts.rows, act);
                double        expected = up.value + (t.bias ? bias[bias_at] : 0);
                // Eight lanes and four warps sum a block's parts: as the CPU's bound, with the bias and more additions.
                double        bound    = fq4_reference::bound(t.n_blocks + 12, up.norm + 500);
                if (t.gate) {
                    const Product g = fq4_reference::multiply(gate.rows, matrix * t.n_rows + r, acts.rows, act);
                    const double  gate_value = g.value + (t.bias ? gate_bias[bias_at] : 0);
                    const double  gate_bound = fq4_reference::bound(t.n_blocks + 12, g.norm + 500);
                    const auto    y          = [&](double gx, double ux) {
                        return glu_reference(t.glu, gx, ux, args.glu_alpha, args.glu_limit);
                    };
                    const double value = y(gate_value, expected);
                    // Both factors' slopes are at most about 2 in magnitude.
                    bound = 2 * (gate_bound * (std::fabs(expected) + 1) + bound * (std::fabs(gate_value) + 1)) +
                            1e-6 * std::fabs(value);
                    expected = value;
                }
                const int64_t at = out * (t.n_rows + pad) + r;
                written[at]      = true;
                CHECK(std::fabs(dst[at] - expected) <= bound,
                      "rows %d, blocks %d, cols %d, batch %ld, column %d, row %d: %g, not %g (bound %g)", t.n_rows,
                      t.n_blocks, t.n_cols, (long) b, c, r, dst[at], expected, bound);
            }
        }
    }
    for (size_t i = 0; i < dst.size(); i++) {
        CHECK(written[i] || dst[i] == POISON, "rows %d, cols %d: element %zu was written", t.n_rows, t.n_cols, i);
    }
}

// The busiest SM's rows are never above those of one block per SM, every group has an owner and none has two.
void check_plan() {
    for (int n_rows : { 1, 4, 5, 1024, 1536, 4096, 14336, 128256 }) {
        for (int64_t n_batches : { 1, 2, 8, 70000 }) {
            for (int n_sm : { 1, 40, 84, 108, 132 }) {
                for (bool gate : { false, true }) {
                    const auto    plan   = ggml_ext_fq4_vec_make_plan(n_rows, gate, n_batches, n_sm, 4);
                    const int64_t rows   = gate ? 2 : 4;
                    const int64_t groups = (n_rows + rows - 1) / rows;
                    CHECK(plan.groups_per_block > 0 && plan.grid_y >= 1 && plan.grid_y <= 65535 &&
                              plan.grid_y <= n_batches && (int64_t) plan.grid_x * plan.groups_per_block >= groups &&
                              ((int64_t) plan.grid_x - 1) * plan.groups_per_block < groups,
                          "rows %d, batches %ld, SMs %d: %u x %u blocks of %d groups", n_rows, (long) n_batches, n_sm,
                          plan.grid_x, plan.grid_y, plan.groups_per_block);
                    const int64_t blocks = (int64_t) plan.grid_x * plan.grid_y;
                    const int64_t load   = (blocks + n_sm - 1) / n_sm * plan.groups_per_block;
                    const int64_t even   = (groups * plan.grid_y + n_sm - 1) / n_sm;
                    // The shapes of the acceptance list on 132 SMs: within 8 % of an even load.
                    if (n_sm == 132 && n_batches == 1 && n_rows >= 1024 && n_rows != 1536 && !gate) {
                        CHECK(load * 100 <= even * 108, "rows %d: %ld, even: %ld", n_rows, (long) load, (long) even);
                    }
                }
            }
        }
    }
}

Case shape(int n_rows, int n_blocks, int n_cols, int n_sm) {
    Case t;
    t.n_rows   = n_rows;
    t.n_blocks = n_blocks;
    t.n_cols   = n_cols;
    t.n_sm     = n_sm;
    return t;
}

void check_columns() {
    for (int n_cols : { 1, 2, 3, 5, 8 }) {
        Case t       = shape(9, 6, n_cols, 1);
        t.first_col  = 1;
        t.more_cols  = 2;
        t.gap_blocks = n_cols % 2;
        t.remainder  = n_cols;
        check(t);
    }
}

void check_shapes() {
    for (int n_blocks : { 1, 2, 3, 4, 5, 14, 17, 70 }) {
        for (int n_rows : { 1, 2, 7 }) {
            Case t      = shape(n_rows, n_blocks, 1, 1);
            t.remainder = n_blocks + n_rows;
            check(t);
        }
    }
    // More groups than a batch of a thread block has.
    check(shape(600, 1, 1, 1));
    check(shape(130, 2, 5, 1));
    check(shape(61, 9, 2, 2));
}

void check_batches() {
    Case t   = shape(5, 3, 2, 1);
    t.ne02   = 2;
    t.ne03   = 2;
    t.ratio2 = 2;
    t.ratio3 = 3;
    check(t);
    t.n_cols = 1;
    t.bias   = true;
    check(t);
    t.gate = true;
    check(t);
}

void check_experts() {
    for (bool shared_input : { false, true }) {
        for (bool gate : { false, true }) {
            Case t         = shape(6, 5, 1, 2);
            t.n_experts    = 5;
            t.n_used       = 3;
            t.n_tokens     = 2;
            t.shared_input = shared_input;
            t.gate         = gate;
            t.bias         = gate;
            check(t);
        }
    }
}

void check_glu() {
    for (int glu : { GGML_EXT_FQ4_VEC_SWIGLU, GGML_EXT_FQ4_VEC_GEGLU, GGML_EXT_FQ4_VEC_SWIGLU_OAI,
                     GGML_EXT_FQ4_VEC_SWIGLU_CLAMP }) {
        for (bool bias : { false, true }) {
            Case t = shape(7, 2, 1, 1);
            t.gate = true;
            t.bias = bias;
            t.glu  = glu;
            check(t);
        }
    }
}

}  // namespace

int main() {
    check_plan();
    for (uint32_t seed : { 1, 2, 3 }) {
        ggml_ext_emulator::seed(seed);
        check_columns();
        check_shapes();
        check_batches();
        check_experts();
        check_glu();
    }
    return check_done();
}
