// Kernels of FQ4 alone (bench_<type>: of its relatives), one thread: billions of multiply-adds per second of every path that this machine has, on a
// matrix of 2048 x 2048. `dots n`: all rows times n columns, weights decoded every time. `tiles 512`: each tile decoded
// once and multiplied with 512 columns. `quantize`: billions of activations per second. Medians of rounds in which
// the paths take turns; the ratios are medians of the rounds' ratios to the first path. With a number of rows the dots
// take so many, which many caches do not hold, and the path in plain C is left out.
//
//     bench_fq4 [rounds [rows]]

#include "fq4-evex256.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

namespace {

#ifndef FQ4_TYPE
#    define FQ4_TYPE GGML_TYPE_FQ4
#endif
const ggml_ext_fq4_kind & KIND = *ggml_ext_fq4_kind_of(FQ4_TYPE);

constexpr int N       = 2048;  // weights of a row, and rows of the tiles
constexpr int BLOCKS  = N / FQ4_QK;
constexpr int COLUMNS = 512;

struct Data {
    int                  rows;  // a multiple of N
    std::vector<uint8_t> weights;
    std::vector<float>   x;
    std::vector<fq4_act> y;
    std::vector<float>   out;
    float *              acc;  // 64-byte aligned
    fq4_tile             tile;
};

size_t row_size() {
    return BLOCKS * sizeof(fq4_block);
}

void make_data(Data & data) {
    std::mt19937                    rng(1);
    std::normal_distribution<float> dist;
    std::vector<float>              row(N);
    data.weights.resize(data.rows * row_size());
    for (int r = 0; r < N; r++) {
        for (float & v : row) {
            v = dist(rng);
        }
        ggml_get_type_traits(KIND.type)->from_float_ref(row.data(), data.weights.data() + r * row_size(), N);
    }
    for (size_t r = N; r < (size_t) data.rows; r += N) {
        std::copy_n(data.weights.begin(), N * row_size(), data.weights.begin() + r * row_size());
    }
    data.x.resize(COLUMNS * N);
    for (float & v : data.x) {
        v = dist(rng);
    }
    data.y.resize(COLUMNS * BLOCKS);
    data.out.resize((size_t) data.rows * GGML_EXT_FQ4_MAX_COLS);
    data.acc = static_cast<float *>(std::aligned_alloc(64, COLUMNS * GGML_EXT_FQ4_TILE_ROWS * sizeof(float)));
}

using Columns = const void * [GGML_EXT_FQ4_MAX_COLS];

void columns_at(const Data & data, int first, int count, int block, Columns & y) {
    for (int c = 0; c < count; c++) {
        y[c] = data.y.data() + (first + c) * BLOCKS + block;
    }
}

void run_dots(const ggml_ext_fq4_path & path, Data & data, int count) {
    Columns y;
    columns_at(data, 0, count, 0, y);
    float * out[GGML_EXT_FQ4_MAX_COLS];
    for (int c = 0; c < count; c++) {
        out[c] = data.out.data() + (size_t) c * data.rows;
    }
    path.dots(data.rows, BLOCKS, data.weights.data(), row_size(), count, y, out);
}

void run_tiles(const ggml_ext_fq4_path & path, Data & data) {
    for (int r = 0; r < N; r += GGML_EXT_FQ4_TILE_ROWS) {
        std::fill(data.acc, data.acc + COLUMNS * GGML_EXT_FQ4_TILE_ROWS, 0.0f);
        for (int block = 0; block < BLOCKS; block++) {
            path.decode(GGML_EXT_FQ4_TILE_ROWS, data.weights.data() + r * row_size() + block * sizeof(fq4_block),
                        row_size(), &data.tile);
            for (int c = 0; c < COLUMNS; c += GGML_EXT_FQ4_MAX_COLS) {
                Columns y;
                columns_at(data, c, GGML_EXT_FQ4_MAX_COLS, block, y);
                path.multiply(&data.tile, GGML_EXT_FQ4_MAX_COLS, y, data.acc + c * GGML_EXT_FQ4_TILE_ROWS);
            }
        }
    }
}

struct Task {
    std::string name;
    double      work;    // per run and N rows, in billions
    bool        dots;    // takes all rows
    int         repeat;  // runs per measurement, for tasks too short for the clock
    void (*run)(const ggml_ext_fq4_path & path, Data & data);
};

constexpr double GIGA = 1e-9 * N * N;

const Task TASKS[] = {
    { "dots 1", 1 * GIGA, true, 8, [](const ggml_ext_fq4_path & p, Data & d) { run_dots(p, d, 1); } },
    { "dots 2", 2 * GIGA, true, 4, [](const ggml_ext_fq4_path & p, Data & d) { run_dots(p, d, 2); } },
    { "dots 4", 4 * GIGA, true, 2, [](const ggml_ext_fq4_path & p, Data & d) { run_dots(p, d, 4); } },
    { "dots 8", 8 * GIGA, true, 1, [](const ggml_ext_fq4_path & p, Data & d) { run_dots(p, d, 8); } },
    { "tiles 512", COLUMNS * GIGA, false, 1, run_tiles },
    { "quantize", 1e-9 * COLUMNS * N, false, 4,
     [](const ggml_ext_fq4_path & p, Data & d) { p.quantize(COLUMNS * N, d.x.data(), d.y.data()); } },
};

double rate(const Task & task, const ggml_ext_fq4_path & path, Data & data) {
    const double passes = task.dots ? (double) data.rows / N : 1.0;
    const int    repeat = passes > 1 ? 1 : task.repeat;
    const auto   start  = std::chrono::steady_clock::now();
    for (int i = 0; i < repeat; i++) {
        task.run(path, data);
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    return task.work * passes * repeat / seconds.count();
}

double median(std::vector<double> x) {
    std::sort(x.begin(), x.end());
    return x[x.size() / 2];
}

}  // namespace

int main(int argc, char ** argv) {
    const int rounds = argc > 1 ? std::atoi(argv[1]) : 7;
    const int rows   = argc > 2 ? std::atoi(argv[2]) : N;
    if (rounds < 1 || rows < N || rows % N != 0) {
        std::fprintf(stderr, "usage: bench_fq4 [rounds [rows]], rows a multiple of %d\n", N);
        return 2;
    }
    std::vector<const ggml_ext_fq4_path *> paths(KIND.paths, KIND.paths + KIND.n_paths);
#ifdef FQ4_EVEX256
    paths.insert(paths.end() - 1, &evex256_path);
#endif
    paths.erase(std::remove_if(paths.begin(), paths.end(),
                               [&](auto * path) {
                                   return !path->available() || (rows > N && path == KIND.paths[KIND.n_paths - 1]);
                               }),
                paths.end());

    Data data;
    data.rows = rows;
    make_data(data);
    std::printf("%-16s", "G/s (ratio)");
    for (const Task & task : TASKS) {
        std::printf("%18s", task.name.c_str());
    }
    std::printf("\n");
    std::vector<std::vector<std::vector<double>>> rates(paths.size(),
                                                        std::vector<std::vector<double>>(std::size(TASKS)));
    for (int round = -1; round < rounds; round++) {  // the first one warms up
        for (size_t p = 0; p < paths.size(); p++) {
            paths[p]->quantize(COLUMNS * N, data.x.data(), data.y.data());
            for (size_t t = 0; t < std::size(TASKS); t++) {
                const double r = rate(TASKS[t], *paths[p], data);
                if (round >= 0) {
                    rates[p][t].push_back(r);
                }
            }
        }
    }
    for (size_t p = 0; p < paths.size(); p++) {
        std::printf("%-16s", paths[p]->name);
        for (size_t t = 0; t < std::size(TASKS); t++) {
            std::vector<double> ratios;
            for (int round = 0; round < rounds; round++) {
                ratios.push_back(rates[p][t][round] / rates[0][t][round]);
            }
            std::printf("%10.2f (%.3f)", median(rates[p][t]), median(ratios));
        }
        std::printf("\n");
    }
    std::free(data.acc);
    return 0;
}
