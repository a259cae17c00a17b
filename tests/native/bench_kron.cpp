// What the online Kronecker factors cost at decode. One token passes the sites of a 1B-shape Llama (hidden
// 2048, ff 8192, 16 layers, 32 heads of 64, 8 of them for k and v; no attention, no embedding, no head):
// at each the transform, then the matrix products that read it, weights and factors coming from memory as
// in real decode. The transforms' time stands against that of the products, and against the two floors:
// bytes and multiply-adds. docs/kron.md explains the figures.
//
//     bench_kron [fq4|q4_0|q4_0_repack] [threads] [f32|f16|hadamard] [rounds]
//
// hadamard: no stored right factors, a Hadamard matrix of order n2 in their place; left factors F16.

#include "core/ext_op.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace {

constexpr int64_t HIDDEN = 2048, FF = 8192, KV = 512;
constexpr int     LAYERS = 16;

// n1 x n2 of each site; the matrices that read it. attn_out has the factor over heads only.
struct Site {
    int64_t              n1, n2;
    bool                 right;
    std::vector<int64_t> outputs;
};

const std::vector<Site> SITES = {
    { 32, 64,  true,  { HIDDEN, KV, KV } },
    { 32, 64,  false, { HIDDEN }         },
    { 32, 64,  true,  { FF, FF }         },
    { 64, 128, true,  { HIDDEN }         },
};

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Tensors with no data yet; the caller allocates each context in one buffer.
ggml_context * new_context() {
    return ggml_init({ ggml_tensor_overhead() * 1024 + ggml_graph_overhead(), nullptr, true });
}

// The buffer type that repacks Q4_0 for the CPU's matrix products, as llama.cpp uses it.
ggml_backend_buffer_type_t repack_type() {
    ggml_backend_reg_t reg = ggml_backend_cpu_reg();
    const auto         get =
        (ggml_backend_dev_get_extra_bufts_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_dev_get_extra_bufts");
    for (ggml_backend_buffer_type_t * type = get(ggml_backend_reg_dev_get(reg, 0)); type && *type; type++) {
        if (std::strstr(ggml_backend_buft_name(*type), "REPACK")) {
            return *type;
        }
    }
    std::fprintf(stderr, "bench_kron: this build has no repacking buffer type\n");
    std::exit(1);
}

void set_random(ggml_tensor * t) {
    static std::mt19937             rng(1);
    std::normal_distribution<float> dist;
    std::vector<float>              x(std::min<int64_t>(ggml_nelements(t), 64 * t->ne[0]));  // rows repeat after 64
    std::generate(x.begin(), x.end(), [&] { return dist(rng) / 16; });
    std::vector<uint8_t> rows(ggml_row_size(t->type, (int64_t) x.size()));
    ggml_quantize_chunk(t->type, x.data(), rows.data(), 0, (int64_t) x.size() / t->ne[0], t->ne[0], nullptr);
    std::vector<uint8_t> all(ggml_nbytes(t));
    for (size_t at = 0; at < all.size(); at += rows.size()) {
        std::memcpy(all.data() + at, rows.data(), std::min(rows.size(), all.size() - at));
    }
    ggml_backend_tensor_set(t, all.data(), 0, all.size());
}

struct Model {
    ggml_type                               weight_type;
    ggml_type                               factor_type;
    bool                                    hadamard;
    std::vector<std::vector<ggml_tensor *>> weights;  // per layer and site, in order
    std::vector<ggml_tensor *>              left, right, inputs;
};

Model make_model(const std::string & weights, const std::string & factors) {
    Model m{ weights == "fq4" ? GGML_TYPE_FQ4 : GGML_TYPE_Q4_0,
             factors == "f32" ? GGML_TYPE_F32 : GGML_TYPE_F16,
             factors == "hadamard",
             {},
             {},
             {},
             {} };
    ggml_context * wctx = new_context();
    ggml_context * fctx = new_context();
    for (int layer = 0; layer < LAYERS; layer++) {
        for (const Site & site : SITES) {
            std::vector<ggml_tensor *> matrices;
            for (int64_t n : site.outputs) {
                matrices.push_back(ggml_new_tensor_2d(wctx, m.weight_type, site.n1 * site.n2, n));
            }
            m.weights.push_back(matrices);
            m.left.push_back(ggml_new_tensor_2d(fctx, m.factor_type, site.n1, site.n1));
            m.right.push_back(site.right && !m.hadamard ? ggml_new_tensor_2d(fctx, m.factor_type, site.n2, site.n2) :
                                                          nullptr);
        }
    }
    for (const Site & site : SITES) {
        m.inputs.push_back(ggml_new_tensor_1d(fctx, GGML_TYPE_F32, site.n1 * site.n2));
    }
    const auto plain = ggml_backend_cpu_buffer_type();
    ggml_backend_alloc_ctx_tensors_from_buft(wctx, weights == "q4_0_repack" ? repack_type() : plain);
    ggml_backend_alloc_ctx_tensors_from_buft(fctx, plain);
    for (ggml_context * ctx : { wctx, fctx }) {
        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
            set_random(t);
        }
    }
    return m;
}

// Clock readings of one pass: op 2 i before the transform of site i, op 2 i + 1 after it.
std::vector<double> stamps;

void stamp(ggml_tensor *, int ith, int, void *) {
    if (ith == 0) {  // every thread comes by
        stamps.push_back(now());
    }
}

// One token through all sites, or their transforms alone. Results share memory, as llama.cpp's allocator
// would have it: one place for transformed inputs, one for products.
ggml_cgraph * make_graph(const Model & m, bool products) {
    const size_t          size   = FF * sizeof(float);
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), 3 * size);
    char *                base   = (char *) ggml_backend_buffer_get_base(buffer);
    ggml_context *        ctx    = new_context();
    ggml_cgraph *         graph  = ggml_new_graph(ctx);

    const auto add = [&](ggml_tensor * t, char * place) {
        ggml_backend_tensor_alloc(buffer, t, place);
        ggml_build_forward_expand(graph, t);
    };
    const auto add_stamp = [&] {
        add(ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, nullptr, 0, stamp, 1, nullptr), base + 2 * size);
    };
    for (size_t i = 0; i < m.weights.size(); i++) {
        const Site &  site = SITES[i % SITES.size()];
        ggml_tensor * x    = m.inputs[i % SITES.size()];
        x = ggml_ext_kron(ctx, x, m.left[i], m.right[i], site.right && m.hadamard ? (int) site.n2 : 0, 1.0f);
        add_stamp();
        add(x, base);
        add_stamp();
        for (ggml_tensor * w : m.weights[i]) {
            if (products) {
                add(ggml_mul_mat(ctx, w, x), base + size);
            }
        }
    }
    add_stamp();
    return graph;
}

struct Times {
    double transforms, products;
};

Times run(ggml_backend_t backend, ggml_cgraph * graph) {
    stamps.clear();
    ggml_backend_graph_compute(backend, graph);
    Times t = { 0, 0 };
    for (size_t i = 0; i + 2 < stamps.size(); i += 2) {
        t.transforms += stamps[i + 1] - stamps[i];
        t.products += stamps[i + 2] - stamps[i + 1];
    }
    return t;
}

// Multiply-adds per second of this machine's vector units, all threads: independent chains in
// registers, as the ggml thread pool does not matter for it.
#if defined(__x86_64__) && defined(__GNUC__)
typedef float vec16 __attribute__((vector_size(64)));

__attribute__((target("avx512f"))) double peak_avx512() {
    vec16 acc[16] = {}, a = {}, b = {};
    for (int i = 0; i < 16; i++) {
        a[i] = 0.999f;
        b[i] = 0.001f;
    }
    const int    n     = 4000000;
    const double start = now();
    for (int k = 0; k < n; k++) {
#    pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            acc[i] = acc[i] * a + b;
        }
        __asm__ volatile("" : "+v"(a));
    }
    const double seconds = now() - start;
    for (int i = 1; i < 16; i++) {
        acc[0] += acc[i];
    }
    volatile float keep = acc[0][0];
    (void) keep;
    return 256.0 * n / seconds;
}
#endif

double peak_multiply_adds() {
#if defined(__x86_64__) && defined(__GNUC__)
    if (__builtin_cpu_supports("avx512f")) {
        return peak_avx512();
    }
#endif
    return 0;
}

// Repacking logs a line per tensor.
void ignore_log(ggml_log_level, const char *, void *) {}

double median(std::vector<double> x) {
    std::sort(x.begin(), x.end());
    return x[x.size() / 2];
}

}  // namespace

int main(int argc, char ** argv) {
    const std::string weights = argc > 1 ? argv[1] : "fq4";
    const int         threads = argc > 2 ? std::atoi(argv[2]) : 1;
    const std::string factors = argc > 3 ? argv[3] : "f16";
    const int         rounds  = argc > 4 ? std::atoi(argv[4]) : 30;
    if ((weights != "fq4" && weights != "q4_0" && weights != "q4_0_repack") || threads < 1 || rounds < 1 ||
        (factors != "f32" && factors != "f16" && factors != "hadamard")) {
        std::fprintf(stderr, "usage: bench_kron [fq4|q4_0|q4_0_repack] [threads] [f32|f16|hadamard] [rounds]\n");
        return 2;
    }
    ggml_log_set(ignore_log, nullptr);
    const Model          m       = make_model(weights, factors);
    const ggml_backend_t backend = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(backend, threads);
    ggml_cgraph * token_graph = make_graph(m, true);
    ggml_cgraph * alone_graph = make_graph(m, false);

    std::vector<double> t_products, t_transforms, t_warm, peaks;
    run(backend, token_graph);
    for (int i = 0; i < rounds; i++) {
        const Times t = run(backend, token_graph);
        t_products.push_back(t.products);
        t_transforms.push_back(t.transforms);
    }
    for (int i = 0; i < 20 * rounds; i++) {
        t_warm.push_back(run(backend, alone_graph).transforms);
    }
    for (int i = 0; i < 5; i++) {
        peaks.push_back(peak_multiply_adds());
    }

    double weight_bytes = 0, factor_bytes = 0, multiply_adds = 0;
    for (size_t i = 0; i < m.weights.size(); i++) {
        const Site & site = SITES[i % SITES.size()];
        for (ggml_tensor * w : m.weights[i]) {
            weight_bytes += (double) ggml_nbytes(w);
        }
        factor_bytes += (double) ggml_nbytes(m.left[i]) + (m.right[i] ? (double) ggml_nbytes(m.right[i]) : 0.0);
        multiply_adds += (double) (site.n1 * site.n2 * (site.n1 + (m.right[i] ? site.n2 : 0)));
    }
    const double token = median(t_products), cold = median(t_transforms), warm = median(t_warm);
    const double floor = multiply_adds / (threads * median(peaks));
    std::printf("%s, %d threads, factors %s, medians of %d rounds\n", weights.c_str(), threads, factors.c_str(),
                rounds);
    std::printf("products             %8.3f ms  %.1f MB at %.1f GB/s\n", 1e3 * token, weight_bytes / 1e6,
                weight_bytes / token / 1e9);
    std::printf("kron before them     %8.3f ms  %.2f %% of the products, %zu ops\n", 1e3 * cold, 100 * cold / token,
                m.left.size());
    std::printf("kron warm            %8.3f ms  %.2f %%\n", 1e3 * warm, 100 * warm / token);
    std::printf("floor by bytes       %8.3f ms  %.2f MB of factors at the products' rate\n",
                1e3 * factor_bytes * token / weight_bytes, factor_bytes / 1e6);
    if (std::isfinite(floor)) {
        std::printf("floor by operations  %8.3f ms  %.1f M multiply-adds at %.1f G/s; reached %.0f %%, warm %.0f %%\n",
                    1e3 * floor, multiply_adds / 1e6, multiply_adds / floor / 1e9, 100 * floor / cold,
                    100 * floor / warm);
    }
    return 0;
}
