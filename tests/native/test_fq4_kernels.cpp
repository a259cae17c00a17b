// Every FQ4 path of this machine, kernel by kernel, against integers: no tolerance anywhere. test_<type>_kernels.cpp is
// the same for its relatives.

#include "check.h"
#include "fq4-evex256.h"
#include "fq4-kind.h"
#include "ggml-cpu.h"

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"
#include "ggml-quants.h"

#include <limits>
#include <memory>

namespace {

using fq4_reference::BLOCK;
using fq4_reference::BLOCK_BYTES;
using fq4_reference::Rows;
using Act = fq4_act;

constexpr int MAX_COLS = GGML_EXT_FQ4_MAX_COLS;
constexpr int ROWS     = GGML_EXT_FQ4_TILE_ROWS;

std::mt19937 rng(99);

std::vector<const ggml_ext_fq4_path *> available_paths() {
    std::vector<const ggml_ext_fq4_path *> paths(fq4_reference::KIND.paths,
                                                 fq4_reference::KIND.paths + fq4_reference::KIND.n_paths);
#ifdef FQ4_EVEX256
    paths.push_back(&evex256_path);
#endif
    std::vector<const ggml_ext_fq4_path *> available;
    for (const ggml_ext_fq4_path * path : paths) {
        std::printf("path %s: %s\n", path->name, path->available() ? "checked" : "not available on this processor");
        if (path->available()) {
            available.push_back(path);
        }
    }
    return available;
}

// Activations with scale 1. largest = 127 is their range; a smaller one keeps long sums below 2^24, where floats are
// exact. With fixed signs all products of largest weights add up.
std::vector<Act> random_acts(int64_t n_blocks, int largest) {
    std::vector<Act> y(n_blocks);
    for (Act & act : y) {
        act.d     = 1.0f;
        act.start = 0;
        for (int8_t & q : act.q) {
            q = (int8_t) ((int) (rng() % (2 * largest + 1)) - largest);
            act.start -= 128 * q;
        }
    }
    return y;
}

int64_t integer_dot(const uint8_t * block, const Act & act) {
    double d;
    int8_t w[BLOCK];
    fq4_reference::decode(block, d, w);
    int64_t sum = 0;
    for (int i = 0; i < BLOCK; i++) {
        sum += w[i] * act.q[i];
    }
    return sum;
}

// Breaks with a weight or activation taken from the wrong place, a block or row skipped, a column's sum leaking into
// another's, a 16-bit sum that saturates, a `start` forgotten; under ASan with a byte read beyond the last row's end.
void test_dots(const ggml_ext_fq4_path & path, int n_rows, int n_blocks, int n_cols, size_t gap) {
    const size_t row_size = n_blocks * BLOCK_BYTES + gap;
    const auto   x        = std::make_unique<uint8_t[]>(n_rows * row_size - gap);
    for (int r = 0; r < n_rows; r++) {
        for (int ib = 0; ib < n_blocks; ib++) {
            fq4_reference::random_block(rng, 1.0f, x.get() + r * row_size + ib * BLOCK_BYTES);
        }
    }
    std::vector<std::vector<Act>>   columns;
    std::vector<std::vector<float>> results(n_cols, std::vector<float>(n_rows, NAN));
    std::vector<const void *>       y;
    std::vector<float *>            out;
    for (int c = 0; c < n_cols; c++) {
        columns.push_back(random_acts(n_blocks, n_blocks <= 3 ? 127 : 20));
    }
    for (int c = 0; c < n_cols; c++) {
        y.push_back(columns[c].data());
        out.push_back(results[c].data());
    }
    path.dots(n_rows, n_blocks, x.get(), row_size, n_cols, y.data(), out.data());
    for (int c = 0; c < n_cols; c++) {
        for (int r = 0; r < n_rows; r++) {
            int64_t sum = 0;
            for (int ib = 0; ib < n_blocks; ib++) {
                sum += integer_dot(x.get() + r * row_size + ib * BLOCK_BYTES, columns[c][ib]);
            }
            CHECK(results[c][r] == (float) sum, "%s, %d blocks, row %d of %d, column %d of %d: %.1f, expected %lld",
                  path.name, n_blocks, r, n_rows, c, n_cols, results[c][r], (long long) sum);
        }
    }
}

void test_dots(const ggml_ext_fq4_path & path) {
    for (int n_blocks : { 1, 2, 3, 8, 17 }) {
        for (int n_cols = 1; n_cols <= MAX_COLS; n_cols++) {
            test_dots(path, 1 + n_cols % 3, n_blocks, n_cols, n_cols % 2 ? 0 : 3 * BLOCK_BYTES);
        }
    }
}

using Tile = fq4_tile;

struct alignas(64) Sums {
    float at[MAX_COLS][ROWS];
};

// Breaks with a layout on which decode and multiply differ, rows or columns exchanged, rows beyond n_rows that are not
// zero weights, sums overwritten in place of added to, or columns beyond n_cols touched.
void test_tile(const ggml_ext_fq4_path & path, int n_rows, int n_cols, size_t gap) {
    const size_t row_size = BLOCK_BYTES + gap;
    const size_t size     = (n_rows - 1) * row_size + BLOCK_BYTES;
    const auto   x        = std::make_unique<uint8_t[]>(size);
    for (int r = 0; r < n_rows; r++) {
        fq4_reference::random_block(rng, (float) (1 + r % 3), x.get() + r * row_size);
    }
    const auto tile = std::make_unique<Tile>();
    std::memset(static_cast<void *>(tile.get()), 0x55, sizeof(Tile));
    path.decode(n_rows, x.get(), row_size, tile.get());

    const std::vector<Act>    acts = random_acts(n_cols, 127);
    std::vector<const void *> y;
    for (const Act & act : acts) {
        y.push_back(&act);
    }
    Sums before, after;
    for (auto & column : before.at) {
        for (float & v : column) {
            v = (float) (rng() % 1000);
        }
    }
    after = before;
    path.multiply(tile.get(), n_cols, y.data(), &after.at[0][0]);
    for (int c = 0; c < MAX_COLS; c++) {
        for (int r = 0; r < ROWS; r++) {
            float expected = before.at[c][r];
            if (c < n_cols && r < n_rows) {
                expected += (float) ((1 + r % 3) * integer_dot(x.get() + r * row_size, acts[c]));
            }
            CHECK(after.at[c][r] == expected, "%s, row %d of %d, column %d of %d: %.1f, expected %.1f", path.name, r,
                  n_rows, c, n_cols, after.at[c][r], expected);
        }
    }
}

void test_tiles(const ggml_ext_fq4_path & path) {
    for (int n_rows = 1; n_rows <= ROWS; n_rows++) {
        test_tile(path, n_rows, 1 + n_rows % MAX_COLS, n_rows % 2 ? 0 : 7 * BLOCK_BYTES);
    }
    for (int n_cols = 1; n_cols <= MAX_COLS; n_cols++) {
        test_tile(path, ROWS, n_cols, 0);
    }
}

// The largest sums there are, +-127 * 127 * 256: any 16-bit step on the way that saturates shows.
void test_extremes(const ggml_ext_fq4_path & path) {
    for (int w : { -127, 127 }) {  // the first of row 15, the last of row 7
        for (int q : { -127, 127 }) {
            uint8_t block[BLOCK_BYTES];
            std::memset(block, w < 0 ? 0xff : 0x77, BLOCK_BYTES);
            std::memset(block + BLOCK_BYTES - fq4_reference::CODE_BYTES, w < 0 ? 0 : 0xff, fq4_reference::CODE_BYTES);
            fq4_reference::set_scale(block, 1.0f);
            Act act;
            act.d     = 1.0f;
            act.start = -128 * BLOCK * q;
            std::memset(act.q, q, sizeof(act.q));
            const void * y        = &act;
            const float  expected = (float) (q * BLOCK * w);
            float        out      = 0;
            float *      to       = &out;
            path.dots(1, 1, block, 0, 1, &y, &to);
            CHECK(out == expected, "%s: dot %g, expected %g", path.name, out, expected);
            Tile tile;
            Sums sums = {};
            path.decode(1, block, BLOCK_BYTES, &tile);
            path.multiply(&tile, 1, &y, &sums.at[0][0]);
            CHECK(sums.at[0][0] == expected, "%s: tile %g, expected %g", path.name, sums.at[0][0], expected);
        }
    }
}

std::vector<float> block_of(float scale, float first) {
    std::normal_distribution<float> dist(0.0f, 1.0f);
    std::vector<float>              x(BLOCK);
    for (float & v : x) {
        v = scale * dist(rng);
    }
    x[rng() % BLOCK] = first;
    return x;
}

std::vector<std::vector<float>> activation_blocks() {
    std::vector<std::vector<float>> blocks;
    for (float scale : { 1.0f, 1e-3f, 1e4f, 1e30f, 1e-30f, 3e-37f, 1e-38f, 1e-42f, 0.0f }) {
        blocks.push_back(block_of(scale, 0.0f));
        blocks.push_back(block_of(scale, -4.0f * scale));
    }
    blocks.push_back(block_of(1.0f, FLT_MAX));
    // A scale of exactly 1 and every tie that there is.
    std::vector<float> ties(BLOCK);
    for (int i = 0; i < BLOCK; i++) {
        ties[i] = (float) (256 / BLOCK * i) - 127.5f;
    }
    ties[0] = 127.0f;
    blocks.push_back(ties);
    for (float bad : { NAN, -NAN, INFINITY, -INFINITY }) {
        for (int at = 0; at < BLOCK; at += 15) {
            blocks.push_back(block_of(1.0f, 2.0f));
            blocks.back()[at] = bad;
        }
    }
    blocks.push_back(std::vector<float>(BLOCK, NAN));
    return blocks;
}

bool same_float(float a, double b) {
    return std::isnan(a) ? std::isnan(b) : a == b;
}

// Breaks with a rounding other than to even, a largest magnitude missed in some lane, a NaN that counts as a number,
// a scale that overflows, values stored in another order.
void test_quantize(const ggml_ext_fq4_path & path) {
    const auto         blocks = activation_blocks();
    std::vector<float> x;
    for (const auto & block : blocks) {
        x.insert(x.end(), block.begin(), block.end());
    }
    std::vector<Act> y(blocks.size());
    path.quantize((int64_t) x.size(), x.data(), y.data());
    for (size_t ib = 0; ib < blocks.size(); ib++) {
        double  d;
        int8_t  q[BLOCK];
        int32_t sum = 0;
        fq4_reference::round_activations(blocks[ib].data(), d, q);
        for (int8_t v : q) {
            sum += v;
        }
        CHECK(same_float(y[ib].d, d), "%s, block %zu: d %g, expected %g", path.name, ib, y[ib].d, d);
        CHECK(std::memcmp(y[ib].q, q, sizeof(q)) == 0, "%s, block %zu: values", path.name, ib);
        CHECK(y[ib].start == -128 * sum, "%s, block %zu: start %d", path.name, ib, y[ib].start);
    }
}

#if FQ4_QK == QK_K
// Our reference of the activations against upstream's: the same d q, up to the sign that it gives both. Upstream's
// compiler may fuse the multiplication with the addition that rounds, so a product that is a tie within float
// rounding may go either way.
void test_reference_is_upstreams() {
    for (int round = 0; round < 50; round++) {
        const std::vector<float> x = block_of(std::ldexp(1.0f, round % 40 - 20), 0.0f);
        double                   d;
        int8_t                   q[BLOCK];
        block_q8_K               upstream;
        fq4_reference::round_activations(x.data(), d, q);
        quantize_row_q8_K_ref(x.data(), &upstream, BLOCK);
        CHECK(std::fabs(upstream.d) == d, "round %d: d %g, upstream's %g", round, d, upstream.d);
        const int sign = upstream.d < 0 ? -1 : 1;
        for (int i = 0; i < BLOCK; i++) {
            const double exact = x[i] / d;
            const bool   tie   = std::fabs(std::fabs(exact - std::floor(exact)) - 0.5) < 1e-4;
            CHECK(std::abs(q[i] - sign * upstream.qs[i]) <= (tie ? 1 : 0), "round %d, value %d: %d, upstream's %d",
                  round, i, q[i], sign * upstream.qs[i]);
        }
    }
}
#endif

}  // namespace

int main() {
    ggml_cpu_init();
    for (const ggml_ext_fq4_path * path : available_paths()) {
        test_dots(*path);
        test_tiles(*path);
        test_extremes(*path);
        test_quantize(*path);
    }
#if FQ4_QK == QK_K
    test_reference_is_upstreams();
#endif
    return check_done();
}
