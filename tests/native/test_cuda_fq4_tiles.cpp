// The CUDA kernels of FQ4 products, or of FQ4_64's, with many columns in the emulator, cut into tiles as a device would have them, against
// the reference of fq4-reference.h.

#include "check.h"
#include "fq4-layout.h"
#include "fq4/tiles.cuh"
#include "fq4/tiles_dp4a.cuh"
#include "fq4/tiles_experts.cuh"

#include <limits>
#include <map>
#include <string>

namespace {

using namespace fq4_reference;

#ifdef __SANITIZE_ADDRESS__
constexpr bool SMALL = true;
#else
constexpr bool SMALL = false;
#endif

constexpr float UNWRITTEN = 12345.0f;

std::mt19937 rng(11);

int uniform(int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(rng);
}

struct Case {
    int  m, n_blocks, n;
    // Batches of activations (ne2, ne3), each weight matrix used `repeat` times.
    int  ne2 = 1, ne3 = 1, repeat2 = 1, repeat3 = 1;
    // Experts: n tokens use n_used of n_experts each, all of them the first n_used where `skewed`.
    int  n_experts = 0, n_used = 0;
    bool shared = false, skewed = false;
    int  gap      = 0;  // unused blocks between rows
    int  offset   = 0;  // of the weights, in bytes from a multiple of 16
    int  n_sm     = 0;  // of the device; 0: tiles are not split
    int  n_ranges = 0;  // in place of the number chosen

    std::string text() const {
        return "m=" + std::to_string(m) + " blocks=" + std::to_string(n_blocks) + " n=" + std::to_string(n) +
               " batch=" + std::to_string(ne2) + "x" + std::to_string(ne3) + " experts=" + std::to_string(n_experts) +
               "/" + std::to_string(n_used) + " offset=" + std::to_string(offset) + " sm=" + std::to_string(n_sm);
    }
};

struct Run {
    Case                 c;
    int                  n_matrices, n_columns, n_activations, column_stride;
    Rows                 weights, activations;
    std::vector<uint8_t> bytes;  // from the first 16-byte boundary on
    std::vector<int8_t>  codes;
    std::vector<float>   scales;
    std::vector<int32_t> ids;

    explicit Run(const Case & c) : c(c) {
        n_matrices    = c.n_experts ? c.n_experts : c.ne2 / c.repeat2 * (c.ne3 / c.repeat3);
        n_columns     = c.n_experts ? c.n * c.n_used : c.n * c.ne2 * c.ne3;
        n_activations = c.n_experts && c.shared ? c.n : n_columns;
        column_stride = c.m + 3;
        make_weights();
        make_activations();
        for (int token = 0; token < c.n && c.n_experts; token++) {
            std::vector<int32_t> all(c.n_experts);
            for (int i = 0; i < c.n_experts; i++) {
                all[i] = i;
            }
            if (!c.skewed) {
                std::shuffle(all.begin(), all.end(), rng);
            }
            ids.insert(ids.end(), all.begin(), all.end());  // rows of n_experts, of which n_used count
        }
    }

    // Bytes before, between and after the blocks are 0xff, so that a scale from there is a NaN. Up to three bytes more
    // than the blocks need may be read.
    void make_weights() {
        weights.n_blocks   = c.n_blocks;
        const size_t n_row = size_t(c.n_blocks + c.gap) * BLOCK_BYTES;
        bytes.assign((c.offset + n_row * c.m * n_matrices + 3) / 4 * 4 + 16, 0xff);
        for (int row = 0; row < c.m * n_matrices; row++) {
            for (int ib = 0; ib < c.n_blocks; ib++) {
                uint8_t * block = aligned() + c.offset + row * n_row + ib * BLOCK_BYTES;
                random_block(rng, std::ldexp(float(uniform(-100, 100)), -10), block);
                weights.d.push_back(0);
                weights.q.resize(weights.q.size() + BLOCK);
                decode(block, weights.d.back(), weights.q.data() + weights.q.size() - BLOCK);
            }
        }
    }

    uint8_t * aligned() { return bytes.data() + (16 - uintptr_t(bytes.data()) % 16) % 16; }

    void make_activations() {
        activations.n_blocks = c.n_blocks;
        codes.resize(size_t(n_activations) * c.n_blocks * BLOCK);
        scales.resize(size_t(n_activations) * c.n_blocks);
        for (auto & code : codes) {
            code = int8_t(uniform(-127, 127));
        }
        for (auto & scale : scales) {
            scale = uniform(0, 20) ? float(uniform(1, 1000)) / 512.0f : 0.0f;
        }
        activations.q = codes;
        for (int row = 0; row < n_activations; row++) {
            for (int ib = 0; ib < c.n_blocks; ib++) {
                activations.d.push_back(scales[ib * n_activations + row]);
            }
        }
    }

    ggml_ext_fq4_product product(std::vector<float> & out) {
        ggml_ext_fq4_product p = {};
        p.weights              = reinterpret_cast<const char *>(aligned() + c.offset);
        p.nb1                  = int64_t(c.n_blocks + c.gap) * BLOCK_BYTES;
        p.nb2                  = p.nb1 * c.m;
        p.nb3                  = p.nb2 * (c.ne2 / c.repeat2);
        p.m                    = c.m;
        p.n_blocks             = c.n_blocks;
        p.k                    = c.n_blocks * BLOCK;
        p.codes                = codes.data();
        p.scales               = scales.data();
        p.n_activations        = n_activations;
        p.dst                  = out.data();
        p.s1                   = column_stride;
        p.s2                   = p.s1 * (c.n_experts ? c.n_used : c.n);
        p.s3                   = p.s2 * c.ne2;
        p.n                    = c.n;
        p.ne2                  = c.ne2;
        p.ne3                  = c.ne3;
        p.repeat2              = c.repeat2;
        p.repeat3              = c.repeat3;
        p.n_used               = c.n_used;
        p.ne1                  = c.shared ? 1 : c.n_used;
        return p;
    }

    template <int COLUMNS> static void launch(ggml_ext_fq4_product & p, bool split) {
        std::vector<float> partial(split ? size_t(p.n_ranges) * COLUMNS * GGML_EXT_FQ4_TILE_ROWS : 0, UNWRITTEN);
        p.partial = partial.data();
        ggml_ext_cuda_launch(ggml_ext_fq4_tiles_kernel<layout, COLUMNS>, dim3(p.n_ranges),
                             dim3(GGML_EXT_FQ4_TILE_THREADS), ggml_ext_fq4_tile_shared(COLUMNS, BLOCK), nullptr, p);
        if (split) {
            ggml_ext_cuda_launch(ggml_ext_fq4_tiles_join<COLUMNS>, dim3(p.n_ranges, COLUMNS / 8),
                                 dim3(GGML_EXT_FQ4_TILE_THREADS), 0, nullptr, p);
        }
    }

    // What the launchers do.
    std::vector<float> compute(bool tensor_cores) {
        std::vector<float>                    out(size_t(column_stride) * n_columns, UNWRITTEN);
        std::vector<ggml_ext_fq4_expert_tile> tiles;
        std::vector<int32_t>                  pairs;
        ggml_ext_fq4_product                  p     = product(out);
        const int                             n_sm  = c.n_sm ? c.n_sm : 1;
        const size_t                          limit = size_t(227) * 1024;
        ggml_ext_fq4_tiling                   t     = c.n_experts ?
                                                          ggml_ext_fq4_choose_expert_tiling(p.m, BLOCK, n_columns, c.n_experts, limit) :
                                                          ggml_ext_fq4_choose_tiling(p.m, p.n_blocks, BLOCK, p.n, c.ne2 * c.ne3, n_sm, limit);
        if (!tensor_cores) {
            t = ggml_ext_fq4_dp4a_tiling(p.m, c.n_experts ? n_columns : p.n, c.ne2 * c.ne3, c.n_experts);
        } else if (c.n_ranges || !c.n_sm) {
            t.split    = c.n_ranges > 0;
            t.n_ranges = c.n_ranges ? c.n_ranges : t.row_tiles * t.column_tiles;
        }
        if (c.n_experts) {
            tiles.assign(t.column_tiles, { 99, 99, 99 });
            pairs.assign(n_columns, -1);
            p.tiles = tiles.data();
            p.pairs = pairs.data();
            ggml_ext_cuda_launch(ggml_ext_fq4_tiles_sort, dim3(c.n_experts), dim3(GGML_EXT_FQ4_SORT_THREADS), 0,
                                 nullptr, ids.data(), int64_t(c.n_experts), c.n, c.n_used, t.columns, pairs.data(),
                                 tiles.data(), t.column_tiles);
        }
        p.column_tiles = t.column_tiles;
        p.row_tiles    = t.row_tiles;
        p.n_ranges     = t.n_ranges;
        n_splits += t.split;
        if (!tensor_cores) {
            ggml_ext_cuda_launch(ggml_ext_fq4_tiles_dp4a<layout>, dim3(p.n_ranges), dim3(GGML_EXT_FQ4_DP4A_THREADS), 0,
                                 nullptr, p);
            return out;
        }
        const std::map<int, void (*)(ggml_ext_fq4_product &, bool)> launchers = {
            { 16,  launch<16>  },
            { 32,  launch<32>  },
            { 64,  launch<64>  },
            { 128, launch<128> }
        };
        launchers.at(t.columns)(p, t.split);
        return out;
    }

    void check(const std::vector<float> & out, const char * what) const {
        for (int column = 0; column < n_columns; column++) {
            int matrix, activation;
            if (c.n_experts) {
                const int token = column / c.n_used, slot = column % c.n_used;
                matrix     = ids[token * c.n_experts + slot];
                activation = c.shared ? token : column;
            } else {
                const int i2 = column / c.n % c.ne2, i3 = column / c.n / c.ne2;
                matrix     = i2 / c.repeat2 + i3 / c.repeat3 * (c.ne2 / c.repeat2);
                activation = column;
            }
            const float * at = out.data() + size_t(column) * column_stride;
            for (int row = 0; row < c.m; row++) {
                const Product expected = multiply(weights, int64_t(matrix) * c.m + row, activations, activation);
                if (std::isnan(expected.value) ?
                        !std::isnan(at[row]) :
                        !(std::fabs(at[row] - expected.value) <= bound(c.n_blocks, expected.norm))) {
                    CHECK(false, "%s, %s, row %d of column %d: %.9g, expected %.9g", c.text().c_str(), what, row,
                          column, at[row], expected.value);
                    return;
                }
            }
            for (int row = c.m; row < column_stride; row++) {
                CHECK(at[row] == UNWRITTEN, "%s, %s: row %d of column %d is written", c.text().c_str(), what, row,
                      column);
            }
        }
    }

    int n_splits = 0;
};

// Breaks with a wrong fragment, table row, scale, alignment, mask, tile or expert; with a part of a split tile that is
// lost, doubled or added in another order from run to run; with a barrier or a wait for a copy too few (the order of
// the threads changes with every launch).
Run test(const Case & c, bool tensor_cores = true) {
    Run                      run(c);
    const char *             what = tensor_cores ? "tiles" : "dp4a";
    const std::vector<float> out  = run.compute(tensor_cores);
    run.check(out, what);
    return run;
}

void test_same_bits(const Case & c) {
    Run                      run(c);
    const std::vector<float> a = run.compute(true), b = run.compute(true);
    CHECK(std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0, "%s: other bits in a second run",
          c.text().c_str());
    run.check(a, "tiles");
    CHECK(run.n_splits == 2, "%s: no tile is split", c.text().c_str());
}

void test_shapes() {
    for (int n : { 1, 9, 16, 17, 33, 65 }) {
        test({ uniform(1, 140), uniform(1, 3), n });
    }
    for (int m : { 1, 31, 33, 128, 129 }) {
        test({ m, 1, uniform(1, 20) });
    }
    if (!SMALL) {
        test({ 256, 3, 300 });
    }
}

// Rows that begin at every kind of address, with odd and even lengths.
void test_alignment() {
    for (int offset = 0; offset < 16; offset += (SMALL ? 3 : 1) * layout::alignment) {
        for (int gap : { 0, 1 }) {
            Case c   = { 40, 1 + offset / 2 % 4, 12 };
            c.offset = offset;
            c.gap    = gap;
            test(c);
        }
    }
}

void test_batches() {
    for (int n : { 3, 20 }) {
        Case c = { 35, 2, n, 4, 3, 2, 3 };
        test(c);
        test(c, false);
    }
}

void test_split() {
    for (int n_sm : { 7, 12 }) {
        Case c = { uniform(100, 128), 24 * 256 / BLOCK, uniform(9, 16) };
        c.n_sm = n_sm;
        test_same_bits(c);
    }
    // Fewer ranges than tiles, as many, and up to one for every step of a tile.
    for (int n_ranges : { 2, 3, 4, 5, 7, 20 }) {
        Case c     = { uniform(129, 200), 5, uniform(17, 32), 2 };
        c.n_ranges = n_ranges;
        test_same_bits(c);
    }
}

void test_experts() {
    for (bool shared : { false, true }) {
        for (bool skewed : { false, true }) {
            Case c      = { 45, 1, SMALL ? 40 : 90 };
            c.n_experts = 5;
            c.n_used    = 2;
            c.shared    = shared;
            c.skewed    = skewed;
            test(c);
            test(c, false);
        }
    }
    Case c      = { 33, 2, 3 };
    c.n_experts = 9;
    c.n_used    = 9;
    test(c);
}

void test_dp4a() {
    for (int n : { 1, 31, 33 }) {
        test({ uniform(1, 140), uniform(1, 3), n }, false);
    }
    Case c   = { 70, 3, 5 };
    c.offset = layout::alignment;
    c.gap    = 2;
    test(c, false);
}

// The largest sums there can be stay exact, and a NaN reaches its row or column and nothing else.
void test_extremes() {
    for (bool tensor_cores : { true, false }) {
        Run run({ 34, 2, 18 });
        for (auto & code : run.codes) {
            code = 127;
        }
        run.activations.q = run.codes;
        for (int row = 0; row < 2; row++) {  // T[15][15] = 127, T[15][0] = -127
            uint8_t * block = run.aligned() + row * 2 * BLOCK_BYTES;
            std::memset(block + layout::s, 0xff, layout::q - layout::s);
            std::memset(block + layout::q, row ? 0x00 : 0xff, BLOCK / 2);
            decode(block, run.weights.d[2 * row], run.weights.q.data() + 2 * row * BLOCK);
        }
        set_nan(run.aligned() + 5 * BLOCK_BYTES);                                     // row 2's second block
        run.weights.d[5]                  = NAN;
        run.scales[run.n_activations + 3] = std::numeric_limits<float>::quiet_NaN();  // column 3, second block
        run.activations.d[3 * 2 + 1]      = NAN;
        run.check(run.compute(tensor_cores), "extremes");
    }
}

}  // namespace

int main() {
    for (uint32_t seed : { 1, 2 }) {
        ggml_ext_emulator::seed(seed);
        test_shapes();
        test_alignment();
        test_split();
        test_extremes();
    }
    test_batches();
    test_experts();
    test_dp4a();
    return check_done();
}
