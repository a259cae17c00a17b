#include "bench.h"

#include "hooks/ggml-ext-hooks.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <stdexcept>

namespace ggml_ext_bench {

namespace {

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// `copies` nodes of a contender, allocated on one backend.
struct nodes {
    ggml_context_ptr           ctx;
    ggml_backend_buffer_ptr    buffer;
    std::vector<ggml_tensor *> inputs, results;
    ggml_cgraph *              graph;

    nodes(ggml_backend_t backend, const contender & contender, int copies, int64_t n) {
        const size_t n_tensors = size_t(copies) * 40;  // of a copy at most
        ctx.reset(ggml_init(
            { n_tensors * ggml_tensor_overhead() + ggml_graph_overhead_custom(n_tensors, false), nullptr, true }));
        graph = ggml_new_graph_custom(ctx.get(), n_tensors, false);
        for (int i = 0; i < copies; i++) {
            results.push_back(contender.build(ctx.get(), n));
            ggml_build_forward_expand(graph, results.back());
        }
        for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t; t = ggml_get_next_tensor(ctx.get(), t)) {
            if (t->op == GGML_OP_NONE && !t->view_src) {
                inputs.push_back(t);
            }
        }
        // Leaves too, as the scheduler asks.
        for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t; t = ggml_get_next_tensor(ctx.get(), t)) {
            if (!ggml_backend_supports_op(backend, t)) {
                throw std::runtime_error(contender.name + ": " + ggml_backend_name(backend) + " does not support " +
                                         ggml_op_desc(t) + " of " + ggml_type_name(t->type));
            }
        }
        buffer.reset(ggml_backend_alloc_ctx_tensors(ctx.get(), backend));
        if (!buffer) {
            throw std::runtime_error(contender.name + ": out of memory on " + ggml_backend_name(backend));
        }
    }

    size_t input_bytes() const {
        size_t bytes = 0;
        for (const ggml_tensor * t : inputs) {
            bytes += ggml_nbytes(t);
        }
        return bytes;
    }
};

// Inputs of the part "sample" by their names; false for another tensor.
bool fill_sampling(ggml_tensor * t, uint32_t seed) {
    const std::string name = t->name;
    if (name == "uniform") {
        const float half = 0.5f;
        ggml_backend_tensor_set(t, &half, 0, sizeof(half));
    } else if (name == "sample_parameters") {
        const ggml_ext_sample_params top_p = { 0, 0.95f, -INFINITY, 0, 1.0f, uint64_t(1) << 63 };
        for (int64_t row = 0; row < t->ne[1]; row++) {
            ggml_backend_tensor_set(t, &top_p, size_t(row) * t->nb[1], sizeof(top_p));
        }
    } else if (name == "logits") {
        std::mt19937                    rng(seed);
        std::normal_distribution<float> normal(0.0f, 2.0f);
        std::vector<float>              x(ggml_nelements(t));
        std::generate(x.begin(), x.end(), [&] { return normal(rng); });
        for (int64_t row = 0; row < t->ne[1]; row++) {  // 2 e^2 n: two thirds of the mass
            x[row * t->ne[0] + rng() % t->ne[0]] = std::log(2.0f * float(t->ne[0])) + 2.0f;
        }
        ggml_backend_tensor_set(t, x.data(), 0, ggml_nbytes(t));
    } else {
        return false;
    }
    return true;
}

// A name "ids of N" asks for other experts for each slot of a token, out of N; false for another tensor.
bool fill_ids(ggml_tensor * t, uint32_t seed) {
    int n_experts = 0;
    if (sscanf(t->name, "ids of %d", &n_experts) != 1) {
        return false;
    }
    std::mt19937         rng(seed);
    std::vector<int32_t> all(n_experts), ids;
    std::iota(all.begin(), all.end(), 0);
    for (int64_t token = 0; token < t->ne[1]; token++) {
        std::shuffle(all.begin(), all.end(), rng);
        ids.insert(ids.end(), all.begin(), all.begin() + t->ne[0]);
    }
    ggml_backend_tensor_set(t, ids.data(), 0, ggml_nbytes(t));
    return true;
}

// Random rows in the tensor's type, over and over from a tile, started elsewhere in each tensor. A name "mask" asks
// for a causal mask of the last ne[1] of ne[0] positions.
void fill(ggml_tensor * t, uint32_t seed) {
    if (fill_sampling(t, seed) || fill_ids(t, seed)) {
        return;
    }
    const int64_t        k = t->ne[0], n_rows = ggml_nrows(t);
    const size_t         row_bytes = ggml_row_size(t->type, k);
    std::vector<uint8_t> bytes(row_bytes * n_rows);
    if (!strcmp(t->name, "mask")) {
        const ggml_fp16_t zero = ggml_fp32_to_fp16(0.0f), hidden = ggml_fp32_to_fp16(-INFINITY);
        ggml_fp16_t *     row = reinterpret_cast<ggml_fp16_t *>(bytes.data());
        for (int64_t i = 0; i < n_rows; i++, row += k) {
            const int64_t n_seen = std::min(k, k - n_rows + i + 1);
            std::fill(row, row + n_seen, zero);
            std::fill(row + n_seen, row + k, hidden);
        }
    } else {
        const int64_t                   n_tile = std::min<int64_t>(n_rows, 61);
        std::vector<float>              x(k * n_tile);
        std::mt19937                    rng(seed);
        std::normal_distribution<float> normal(0.0f, 1.0f / std::sqrt(float(k)));
        std::generate(x.begin(), x.end(), [&] { return normal(rng); });
        std::vector<uint8_t> tile(row_bytes * n_tile);
        if (t->type == GGML_TYPE_F32) {
            memcpy(tile.data(), x.data(), tile.size());
        } else {
            ggml_quantize_chunk(t->type, x.data(), tile.data(), 0, n_tile, k, nullptr);
        }
        for (int64_t row = 0; row < n_rows; row++) {
            memcpy(&bytes[row * row_bytes], &tile[(row + row / n_tile * 7) % n_tile * row_bytes], row_bytes);
        }
    }
    ggml_backend_tensor_set(t, bytes.data(), 0, bytes.size());
}

void poison(const nodes & nodes) {
    for (ggml_tensor * t : nodes.results) {
        ggml_backend_tensor_memset(t, 0xff, 0, ggml_nbytes(t));
    }
}

std::vector<float> values(const ggml_tensor * t, size_t n) {
    std::vector<float> v(n);
    ggml_backend_tensor_get(t, v.data(), 0, n * sizeof(float));
    return v;
}

// Largest error of any copy: the squares of the differences over those of the CPU's result.
double check(const options & options, const contender & contender, const nodes & nodes) {
    const int64_t         n = std::min<int64_t>(contender.n, 3);
    ggml_ext_bench::nodes reference(options.cpu, contender, 1, n);
    const size_t          per_copy = nodes.inputs.size() / nodes.results.size();
    double                worst    = 0.0;
    for (size_t copy = 0; copy < nodes.results.size(); copy++) {
        for (float y : values(nodes.results[copy], ggml_nelements(nodes.results[copy]))) {
            if (std::isnan(y)) {
                throw std::runtime_error(contender.name + ": an output has NaN or was not written");
            }
        }
        if (copy != 0 && copy + 1 != nodes.results.size()) {
            continue;  // the reference is slow: first and last
        }
        for (size_t i = 0; i < per_copy; i++) {
            ggml_tensor *        to = reference.inputs[i];
            std::vector<uint8_t> bytes(ggml_nbytes(to));
            ggml_backend_tensor_get(nodes.inputs[copy * per_copy + i], bytes.data(), 0, bytes.size());
            ggml_backend_tensor_set(to, bytes.data(), 0, bytes.size());
        }
        if (ggml_backend_graph_compute(options.cpu, reference.graph) != GGML_STATUS_SUCCESS) {
            throw std::runtime_error(contender.name + ": the reference failed");
        }
        const size_t             size = ggml_nelements(reference.results[0]);
        const std::vector<float> want = values(reference.results[0], size), got = values(nodes.results[copy], size);
        double                   error = 0.0, signal = 0.0;
        for (size_t i = 0; i < size; i++) {
            error += (double(got[i]) - want[i]) * (double(got[i]) - want[i]);
            signal += double(want[i]) * want[i];
        }
        worst = std::max(worst, error / signal);
    }
    return worst;
}

double timed(const options & options, const nodes & nodes, int repeats) {
    ggml_backend_synchronize(options.device);
    const double start = now();
    for (int i = 0; i < repeats; i++) {
        if (ggml_backend_graph_compute_async(options.device, nodes.graph) != GGML_STATUS_SUCCESS) {
            throw std::runtime_error("a graph failed");
        }
    }
    ggml_backend_synchronize(options.device);
    return (now() - start) / (double(repeats) * double(nodes.results.size()));
}

}  // namespace

std::vector<figures> measure(const options & options, const std::vector<contender> & contenders, double max_nmse) {
    std::vector<nodes> all;
    std::vector<int>   repeats;
    uint32_t           seed = 1;
    for (const contender & contender : contenders) {
        const size_t one    = nodes(options.device, contender, 1, contender.n).input_bytes();
        const int    copies = int(std::clamp<size_t>(options.cache_bytes / one + 2, 2, 256));
        all.emplace_back(options.device, contender, copies, contender.n);
        for (ggml_tensor * t : all.back().inputs) {
            fill(t, seed++);
        }
        contender.select();
        for (int i = 0; i < 3; i++) {  // the CUDA backend captures its graph now
            timed(options, all.back(), 1);
        }
        const double once = timed(options, all.back(), 1) * copies;
        repeats.push_back(int(std::clamp(options.seconds / once, 1.0, 1000.0)));
    }
    std::vector<figures> found(contenders.size());
    for (int round = 0; round < options.rounds; round++) {
        for (size_t turn = 0; turn < contenders.size(); turn++) {
            const size_t i = round % 2 ? contenders.size() - 1 - turn : turn;
            contenders[i].select();
            poison(all[i]);
            found[i].seconds.push_back(timed(options, all[i], repeats[i]));
            if (round == 0) {
                found[i].nmse = check(options, contenders[i], all[i]);
                if (!(found[i].nmse <= max_nmse)) {
                    throw std::runtime_error(contenders[i].name + ": nmse " + std::to_string(found[i].nmse) +
                                             " is above " + std::to_string(max_nmse));
                }
            } else {
                for (ggml_tensor * t : all[i].results) {
                    for (float y : values(t, ggml_nelements(t))) {
                        if (std::isnan(y)) {
                            throw std::runtime_error(contenders[i].name + ": an output was not written");
                        }
                    }
                }
            }
        }
    }
    return found;
}

void report(const std::string & name, const std::string & shape, const std::vector<contender> & contenders,
            const std::vector<figures> & found) {
    for (size_t i = 0; i < contenders.size(); i++) {
        std::printf("{\"part\": \"%s\", \"shape\": \"%s\", \"contender\": \"%s\", \"bytes\": %.0f, \"ops\": %.0f, "
                    "\"nmse\": %.3e, \"seconds\": [",
                    name.c_str(), shape.c_str(), contenders[i].name.c_str(), contenders[i].bytes, contenders[i].ops,
                    found[i].nmse);
        for (size_t round = 0; round < found[i].seconds.size(); round++) {
            std::printf("%s%.4e", round ? ", " : "", found[i].seconds[round]);
        }
        std::printf("]}\n");
    }
    std::fflush(stdout);
}

}  // namespace ggml_ext_bench
