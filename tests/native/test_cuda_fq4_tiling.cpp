// How products of FQ4 and FQ4_64 weights are cut into tiles and ranges (fq4/tiles_problem.h), for devices of many kinds.

#include "check.h"
#include "fq4/tiles_problem.h"

#include <random>

namespace {

std::mt19937 rng(5);

int uniform(int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(rng);
}

// Every step of every tile is in one range, and the numbers of thread blocks and bytes are what devices take.
void test_tilings() {
    for (int i = 0; i < 2000; i++) {
        const int     weights = i % 2 ? 64 : 256;
        const int64_t m = uniform(1, 30000), n_blocks = uniform(1, 112), n = uniform(1, 5000), batches = uniform(1, 3);
        const size_t  limit = i % 3 == 0 ? 64 * 1024 : i % 3 == 1 ? 99 * 1024 : 227 * 1024;
        const ggml_ext_fq4_tiling t =
            ggml_ext_fq4_choose_tiling(m, n_blocks, weights, n, batches, uniform(1, 150), limit);
        const int n_steps = int(t.row_tiles * t.column_tiles * n_blocks);
        CHECK(ggml_ext_fq4_tile_shared(t.columns, weights) <= limit, "%d columns in %zu bytes", t.columns, limit);
        CHECK(t.row_tiles * int64_t(GGML_EXT_FQ4_TILE_ROWS) >= m && t.column_tiles * int64_t(t.columns) >= n * batches,
              "tiles leave something out");
        CHECK(t.n_ranges > 0 && (t.split || n_steps == t.n_ranges * n_blocks), "ranges are no tiles");
        CHECK(ggml_ext_fq4_range_begin(0, t.n_ranges, n_steps) == 0 &&
                  ggml_ext_fq4_range_begin(t.n_ranges, t.n_ranges, n_steps) == n_steps,
              "ranges do not cover the steps");
        for (int j = 0; j < t.n_ranges; j += 1 + t.n_ranges / 50) {
            const int64_t length =
                ggml_ext_fq4_range_begin(j + 1, t.n_ranges, n_steps) - ggml_ext_fq4_range_begin(j, t.n_ranges, n_steps);
            CHECK(length >= n_steps / t.n_ranges && length <= n_steps / t.n_ranges + 1, "unequal ranges");
        }
    }
    // A device's worth of tiles is not split, a few deep ones are.
    CHECK(!ggml_ext_fq4_choose_tiling(16896, 16, 256, 512, 1, 132, 227 * 1024).split, "full waves are split");
    CHECK(ggml_ext_fq4_choose_tiling(1024, 56, 256, 32, 1, 132, 227 * 1024).split, "8 tiles on 132 multiprocessors");
}

}  // namespace

int main() {
    test_tilings();
    return check_done();
}
