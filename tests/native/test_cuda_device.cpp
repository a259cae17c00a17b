// The seam between cuda/ and llama.cpp, on a device that stands in for a GPU (cuda-stand-in): the real supports_op under
// the real scheduler, which asks it for weights and views too, and the real fusion, from one op up to a whole model whose
// layers are all on the device.

#pragma GCC diagnostic ignored "-Wunused-function"  // in upstream's ggml-impl.h

#include "bench/bench.h"
#include "check.h"
#include "ext-cuda.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"
#include "ggml-ext.h"
#include "llama-cpp.h"
#include "stand-in.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <random>
#include <string>
#include <vector>

namespace {

const char * const answers[] = { "not ours", "no", "yes" };

ggml_context_ptr new_context() {
    return ggml_context_ptr(ggml_init({ 64 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }));
}

void check_answer(const char * what, const ggml_tensor * op, ggml_ext_cuda_answer want) {
    const ggml_ext_cuda_answer answer = ggml_ext_cuda_supports(0, op);
    CHECK(answer == want, "%s: %s, wanted %s", what, answers[answer], answers[want]);
}

// The scheduler asks for each weight of a graph, and for views of it. Upstream says yes to all of them.
void test_leaves() {
    const ggml_context_ptr ctx = new_context();
    for (ggml_type type : { GGML_TYPE_Q4_0, GGML_TYPE_FQ4, GGML_TYPE_FQ4_64 }) {
        ggml_tensor * weight = ggml_new_tensor_2d(ctx.get(), type, 256, 4);
        check_answer("leaf", weight, GGML_EXT_CUDA_NOT_OURS);
        check_answer("view", ggml_view_1d(ctx.get(), weight, 256, 0), GGML_EXT_CUDA_NOT_OURS);
        check_answer("reshape", ggml_reshape_1d(ctx.get(), weight, 1024), GGML_EXT_CUDA_NOT_OURS);
        check_answer("permute", ggml_permute(ctx.get(), weight, 0, 2, 1, 3), GGML_EXT_CUDA_NOT_OURS);
        check_answer("transpose", ggml_transpose(ctx.get(), weight), GGML_EXT_CUDA_NOT_OURS);
    }
}

void test_products() {
    const ggml_context_ptr ctx = new_context();
    for (ggml_type type : { GGML_TYPE_FQ4, GGML_TYPE_FQ4_64 }) {
        const int64_t k      = ggml_blck_size(type);
        ggml_tensor * weight = ggml_new_tensor_2d(ctx.get(), type, k, 4);
        ggml_tensor * x      = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, k, 3);
        ggml_tensor * y      = ggml_mul_mat(ctx.get(), weight, x);
        check_answer("product", y, GGML_EXT_CUDA_YES);
        check_answer("f16 product", ggml_mul_mat(ctx.get(), weight, ggml_cast(ctx.get(), x, GGML_TYPE_F16)),
                     GGML_EXT_CUDA_NO);
        check_answer("concat", ggml_concat(ctx.get(), weight, weight, 1), GGML_EXT_CUDA_NO);
        CHECK(ggml_ext_cuda_owns(y), "a product with %s weights", ggml_type_name(type));
    }
}

ggml_tensor * attention(ggml_context * ctx, ggml_type k, ggml_type v, int64_t n_q) {
    return ggml_flash_attn_ext(ctx, ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 64, n_q, 8),
                               ggml_new_tensor_3d(ctx, k, 64, 512, 2), ggml_new_tensor_3d(ctx, v, 64, 512, 2), nullptr,
                               0.125f, 0.0f, 0.0f);
}

// No device has run these kernels: a stock model gets them when it asks.
void test_attention_is_opt_in() {
    const ggml_context_ptr ctx = new_context();
    for (int64_t n_q : { 1, 64 }) {
        ggml_tensor * op = attention(ctx.get(), GGML_TYPE_Q8_0, GGML_TYPE_Q8_0, n_q);
        for (const char * mode : { "default", "off", "half", "full" }) {
            ggml_ext_attention_set(mode);
            const bool asked = !strcmp(mode, "half") || !strcmp(mode, "full");
            check_answer(mode, op, asked ? GGML_EXT_CUDA_YES : GGML_EXT_CUDA_NOT_OURS);
        }
    }
    ggml_ext_attention_set("default");
}

// What counts is the architecture that the code was compiled for, not the newer one that runs it.
void test_compiled_architecture() {
    const ggml_context_ptr ctx = new_context();
    ggml_ext_attention_set("half");
    const auto answers_for = [&](int architecture, ggml_ext_cuda_answer product, ggml_ext_cuda_answer attention_op) {
        stand_in_compiled_for(architecture);
        for (int64_t n : { 1, 64 }) {
            ggml_tensor * weight = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_FQ4, 256, 4);
            check_answer("product",
                         ggml_mul_mat(ctx.get(), weight, ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, 256, n)),
                         product);
            check_answer("attention", attention(ctx.get(), GGML_TYPE_Q8_0, GGML_TYPE_Q8_0, n), attention_op);
        }
    };
    answers_for(750, GGML_EXT_CUDA_YES, GGML_EXT_CUDA_YES);
    answers_for(700, GGML_EXT_CUDA_YES, GGML_EXT_CUDA_NOT_OURS);
    answers_for(600, GGML_EXT_CUDA_NO, GGML_EXT_CUDA_NOT_OURS);
    stand_in_compiled_for(900);
    ggml_ext_attention_set("default");
}

// FQ4 to FQ4, both on the device: the scheduler aborts where no backend takes a result that has its place already.
void test_copy() {
    const ggml_context_ptr ctx = new_context();
    const ggml_backend_ptr device(ggml_backend_dev_init(stand_in_device(), nullptr)), cpu(ggml_backend_cpu_init());
    ggml_tensor *          from = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_FQ4, 256, 4);
    ggml_tensor *          to   = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_FQ4, 256, 4);
    const ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors(ctx.get(), device.get()));
    std::vector<uint8_t>          bytes(ggml_nbytes(from)), copied(ggml_nbytes(from));
    for (size_t i = 0; i < bytes.size(); i++) {
        bytes[i] = uint8_t(7 * i);
    }
    ggml_backend_tensor_set(from, bytes.data(), 0, bytes.size());

    ggml_cgraph * graph = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(graph, ggml_cpy(ctx.get(), from, to));
    ggml_backend_t               backends[] = { device.get(), cpu.get() };
    const ggml_backend_sched_ptr sched(ggml_backend_sched_new(backends, nullptr, 2, 64, false, true));
    CHECK(ggml_backend_sched_graph_compute(sched.get(), graph) == GGML_STATUS_SUCCESS, "compute");
    ggml_backend_tensor_get(to, copied.data(), 0, copied.size());
    CHECK(bytes == copied, "the copy differs");
}

// --- a whole model ---

constexpr int n_layers = 2, n_vocab = 256, n_prompt = 12;

struct session {
    llama_model_ptr   model;
    llama_context_ptr context;
    llama_pos         pos = 0;

    session(const std::string & path, bool on_device, ggml_type cache) {
        ggml_backend_dev_t devices[] = { on_device ? stand_in_device() : nullptr, nullptr };
        llama_model_params params    = llama_model_default_params();
        params.devices               = devices;
        params.n_gpu_layers          = on_device ? 99 : 0;
        model.reset(llama_model_load_from_file(path.c_str(), params));
        GGML_ASSERT(model);
        llama_context_params options = llama_context_default_params();
        options.n_ctx                = 256;
        options.n_batch = options.n_ubatch = 32;
        options.n_threads = options.n_threads_batch = 1;
        options.type_k = options.type_v = cache;
        options.flash_attn_type         = LLAMA_FLASH_ATTN_TYPE_ENABLED;
        context.reset(llama_init_from_model(model.get(), options));
        GGML_ASSERT(context);
    }

    // Logits of the last token.
    std::vector<float> decode(int n_tokens) {
        std::vector<llama_token> tokens(n_tokens);
        for (int i = 0; i < n_tokens; i++) {
            tokens[i] = (37 * (pos + i) + 11) % n_vocab;
        }
        GGML_ASSERT(llama_decode(context.get(), llama_batch_get_one(tokens.data(), n_tokens)) == 0);
        pos += n_tokens;
        const float * logits = llama_get_logits_ith(context.get(), -1);
        return std::vector<float>(logits, logits + n_vocab);
    }
};

double nmse(const std::vector<float> & got, const std::vector<float> & want) {
    double error = 0.0, signal = 0.0;
    for (size_t i = 0; i < want.size(); i++) {
        error += (double(got[i]) - want[i]) * (double(got[i]) - want[i]);
        signal += double(want[i]) * want[i];
    }
    return error / signal;  // NaN where anything was not written
}

// Catches: a weight that the scheduler may not leave on the device, a node that falls to the CPU, a fusion that skips a
// node that somebody reads, an int8 form of another activation.
void test_model(const std::string & path, bool transforms, ggml_type cache, const char * attention_mode) {
    const std::string what = path + ", cache " + ggml_type_name(cache) + ", attention " + attention_mode;
    ggml_ext_attention_set(attention_mode);
    const bool our_attention = cache == GGML_TYPE_Q8_0 && strcmp(attention_mode, "default") != 0;
    session    device(path, true, cache), cpu(path, false, cache);
    for (int n_tokens : { n_prompt, 1 }) {
        stand_in_counted()            = {};
        const double            error = nmse(device.decode(n_tokens), cpu.decode(n_tokens));
        const stand_in_counts & seen  = stand_in_counted();
        CHECK(error < 1e-3, "%s, %d tokens: nmse %g", what.c_str(), n_tokens, error);
        // For one token gate, up and GLU are one launch, and so are o and down with the sum that follows; but o of the last
        // layer, behind which only the wanted tokens' rows go on: there a prompt has one token left, too.
        const int fused    = n_tokens == 1 ? 3 * n_layers + 2 * (2 * n_layers - 1) : 5;
        const int products = n_tokens == 1 ? 3 * n_layers + 1 : 7 * (n_layers - 1) + 4;
        const int ours     = products + 1 /* the head */ + (transforms ? 4 * n_layers : 0) +
                         (our_attention && n_tokens == 1 ? n_layers : 0);
        CHECK(seen.ours == ours && seen.fused == fused, "%s, %d tokens: %d nodes, wanted %d; %d fused, wanted %d",
              what.c_str(), n_tokens, seen.ours, ours, seen.fused, fused);
    }
    ggml_ext_attention_set("default");
}

// A captured graph holds the kernels of the setting that it was captured under.
void test_captured_graphs(const std::string & path) {
    session    device(path, true, GGML_TYPE_Q8_0);
    const auto replays = [&](int n_tokens) {
        stand_in_counted() = {};
        for (int i = 0; i < n_tokens; i++) {
            device.decode(1);
        }
        return stand_in_counted().replayed;
    };
    replays(2);  // the second one captures
    CHECK(replays(1) > 0, "nothing is captured, so the test shows nothing");
    ggml_ext_attention_set("half");
    CHECK(replays(1) == 0, "a graph of another setting was launched");
    replays(1);
    CHECK(replays(1) > 0, "no graph is captured any more");
    ggml_ext_attention_set("default");
    CHECK(replays(1) == 0, "a graph of another setting was launched");
}

}  // namespace

int main() {
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    stand_in_device();
    test_leaves();
    test_products();
    test_attention_is_opt_in();
    test_compiled_architecture();
    test_copy();

    const auto        folder = std::filesystem::temp_directory_path();
    const std::string name   = "ggml-ext-test-cuda-device-" + std::to_string(std::random_device{}());
    const std::string plain = folder / (name + ".gguf"), transformed = folder / (name + "-fq.gguf");
    const std::string plain_64 = folder / (name + "-64.gguf"), transformed_64 = folder / (name + "-64-fq.gguf");
    ggml_ext_bench::write_model(plain, "fq4", n_layers, false, 64);
    ggml_ext_bench::write_model(transformed, "fq4", n_layers, true, 64);
    ggml_ext_bench::write_model(plain_64, "fq4_64", n_layers, false, 64);
    ggml_ext_bench::write_model(transformed_64, "fq4_64", n_layers, true, 64);
    test_model(plain, false, GGML_TYPE_Q8_0, "default");
    test_model(plain, false, GGML_TYPE_Q8_0, "half");
    test_model(plain_64, false, GGML_TYPE_Q8_0, "default");
    test_model(transformed_64, true, GGML_TYPE_F16, "default");
    test_model(transformed, true, GGML_TYPE_F16, "default");
    test_captured_graphs(plain);
    std::remove(plain.c_str());
    std::remove(transformed.c_str());
    std::remove(plain_64.c_str());
    std::remove(transformed_64.c_str());
    return check_done();
}
