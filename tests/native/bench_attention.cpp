// Attention over a cache: llama.cpp's own code against quantised attention, in one process, in turn. Shapes of a 1B
// Llama (32 query heads and 8 kv heads of 64), cache and queries random, causal mask. The time is that of a graph with
// one FLASH_ATTN_EXT over each of several caches, so that a token reads its cache from memory as in a model.
//
//     bench_attention [path=NAME] [threads] [rounds] [q_len] [n_kv ...]
//
// path: one that attention/cpu/attention.h lists in place of the fastest, among them avx2 and generic.
//
// A line gives medians: milliseconds per layer with each setting, and the ratio of times within a round.

#include "attention/cpu/attention.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml-ext.h"
#include "ggml.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace {

constexpr int64_t HEADS = 32, KV_HEADS = 8, HEAD = 64;

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double median(std::vector<double> x) {
    std::sort(x.begin(), x.end());
    return x[x.size() / 2];
}

std::mt19937 rng(1);

// Rows repeat after 1024.
void set_random(ggml_tensor * t) {
    std::normal_distribution<float> dist;
    const int64_t                   n_rows = std::min<int64_t>(ggml_nrows(t), 1024);
    std::vector<float>              x(n_rows * t->ne[0]);
    std::generate(x.begin(), x.end(), [&] { return dist(rng); });
    std::vector<uint8_t> rows(ggml_row_size(t->type, (int64_t) x.size()));
    ggml_quantize_chunk(t->type, x.data(), rows.data(), 0, n_rows, t->ne[0], nullptr);
    std::vector<uint8_t> all(ggml_nbytes(t));
    for (size_t at = 0; at < all.size(); at += rows.size()) {
        std::memcpy(all.data() + at, rows.data(), std::min(rows.size(), all.size() - at));
    }
    ggml_backend_tensor_set(t, all.data(), 0, all.size());
}

// Queries are the last n_q tokens of the cache.
void set_causal(ggml_tensor * mask) {
    const int64_t            n_kv = mask->ne[0], n_q = mask->ne[1];
    std::vector<ggml_fp16_t> x(n_kv * n_q);
    for (int64_t i = 0; i < n_q; i++) {
        for (int64_t j = 0; j < n_kv; j++) {
            x[i * n_kv + j] = ggml_fp32_to_fp16(j <= n_kv - n_q + i ? 0.0f : -INFINITY);
        }
    }
    ggml_backend_tensor_set(mask, x.data(), 0, x.size() * sizeof(x[0]));
}

struct Bench {
    ggml_context *             ctx;
    ggml_cgraph *              graph;
    ggml_backend_buffer_t      buffer;
    std::vector<ggml_tensor *> results;

    Bench(ggml_type type, int64_t n_q, int64_t n_kv) {
        const int layers = n_q < 16 ? 16 : 1;

        ctx   = ggml_init({ 1 << 20, nullptr, true });
        graph = ggml_new_graph(ctx);

        ggml_tensor * mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, n_kv, n_q);
        ggml_tensor * q    = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, HEAD, HEADS, n_q);

        std::vector<ggml_tensor *> leaves = { q };
        for (int layer = 0; layer < layers; layer++) {
            // As llama.cpp's cache: a token's heads are adjacent.
            ggml_tensor * k = ggml_new_tensor_3d(ctx, type, HEAD, KV_HEADS, n_kv);
            ggml_tensor * v = ggml_new_tensor_3d(ctx, type, HEAD, KV_HEADS, n_kv);
            leaves.push_back(k);
            leaves.push_back(v);
            ggml_tensor * out =
                ggml_flash_attn_ext(ctx, ggml_permute(ctx, q, 0, 2, 1, 3), ggml_permute(ctx, k, 0, 2, 1, 3),
                                    ggml_permute(ctx, v, 0, 2, 1, 3), mask, 1 / std::sqrt((float) HEAD), 0, 0);
            results.push_back(out);
            ggml_build_forward_expand(graph, out);
        }
        buffer = ggml_backend_alloc_ctx_tensors_from_buft(ctx, ggml_backend_cpu_buffer_type());
        for (ggml_tensor * t : leaves) {
            set_random(t);
        }
        set_causal(mask);
    }

    ~Bench() {
        ggml_backend_buffer_free(buffer);
        ggml_free(ctx);
    }

    Bench(const Bench &)             = delete;
    Bench & operator=(const Bench &) = delete;

    double run(ggml_backend_t backend, const char * mode) const {
        if (ggml_ext_attention_set(mode) != 0) {
            std::fprintf(stderr, "no mode %s\n", mode);
            std::exit(1);
        }
        const double start = now();
        ggml_backend_graph_compute(backend, graph);
        return (now() - start) / (double) results.size();
    }

    std::vector<float> result() const {
        std::vector<float> x(ggml_nelements(results[0]));
        ggml_backend_tensor_get(results[0], x.data(), 0, x.size() * sizeof(x[0]));
        return x;
    }
};

// Root of the squared difference over the squares of the first.
double distance(const std::vector<float> & a, const std::vector<float> & b) {
    double error = 0, signal = 0;
    for (size_t i = 0; i < a.size(); i++) {
        error += (a[i] - b[i]) * (a[i] - b[i]);
        signal += a[i] * a[i];
    }
    return std::sqrt(error / signal);
}

struct Case {
    ggml_type    type;
    const char * mode;
};

const Case CASES[] = {
    { GGML_TYPE_Q8_0, "full"     },
    { GGML_TYPE_Q8_0, "half"     },
    { GGML_TYPE_Q4_0, "full"     },
    { GGML_TYPE_F16,  "full/f16" },
};

// Stock time of an f16 cache of the same shape, run in the same rounds, is the other thing to compare with.
void measure(ggml_backend_t backend, int64_t n_q, int64_t n_kv, int rounds) {
    const Bench f16(GGML_TYPE_F16, n_q, n_kv);
    for (const Case & c : CASES) {
        const Bench bench(c.type, n_q, n_kv);
        bench.run(backend, "off");
        const std::vector<float> stock = bench.result();
        bench.run(backend, c.mode);
        const double        error = distance(stock, bench.result());
        std::vector<double> t_stock, t_ours, t_f16, gain, gain_f16;
        for (int i = 0; i < rounds; i++) {
            t_ours.push_back(bench.run(backend, c.mode));
            t_stock.push_back(bench.run(backend, "off"));
            t_f16.push_back(f16.run(backend, "off"));
            gain.push_back(t_stock.back() / t_ours.back());
            gain_f16.push_back(t_f16.back() / t_ours.back());
        }
        std::printf("%6d %6d  %-5s %-9s %9.3f %9.3f %9.3f %8.2f %8.2f  %.5f\n", (int) n_q, (int) n_kv,
                    ggml_type_name(c.type), c.mode, 1e3 * median(t_ours), 1e3 * median(t_stock), 1e3 * median(t_f16),
                    median(gain), median(gain_f16), error);
        std::fflush(stdout);
    }
}

bool force(const char * name) {
    for (int i = 0; i < ggml_ext_attention_n_paths; i++) {
        const ggml_ext_attention_path * path = ggml_ext_attention_paths[i];
        if (std::strcmp(path->name, name) == 0 && path->available()) {
            ggml_ext_attention_skip(i);
            return true;
        }
    }
    return false;
}

}  // namespace

int main(int argc, char ** argv) {
    if (argc > 1 && std::strncmp(argv[1], "path=", 5) == 0) {
        if (!force(argv[1] + 5)) {
            std::fprintf(stderr, "no such path on this machine: %s\n", argv[1] + 5);
            return 2;
        }
        argc--;
        argv++;
    }
    const int            threads = argc > 1 ? std::atoi(argv[1]) : 1;
    const int            rounds  = argc > 2 ? std::atoi(argv[2]) : 3;
    const int64_t        n_q     = argc > 3 ? std::atoi(argv[3]) : 1;
    std::vector<int64_t> sizes;
    for (int i = 4; i < argc; i++) {
        sizes.push_back(std::atoi(argv[i]));
    }
    if (sizes.empty()) {
        sizes = { 512, 4096, 8192 };
    }
    if (threads < 1 || rounds < 1 || n_q < 1 || *std::min_element(sizes.begin(), sizes.end()) < n_q) {
        std::fprintf(stderr,
                     "usage: bench_attention [path=NAME] [threads] [rounds] [q_len] [n_kv, at least q_len ...]\n");
        return 2;
    }
    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    const ggml_backend_t backend = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(backend, threads);
    std::printf("%d threads, medians of %d rounds, ms per layer\n", threads, rounds);
    std::printf("%6s %6s  %-5s %-9s %9s %9s %9s %8s %8s  %s\n", "q_len", "n_kv", "cache", "mode", "ours", "stock",
                "stock f16", "stock/", "f16/", "distance");
    for (const int64_t n_kv : sizes) {
        measure(backend, n_q, n_kv, rounds);
    }
    ggml_backend_free(backend);
    return 0;
}
