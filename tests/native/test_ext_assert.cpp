// What the constructors of our ops refuse, and what the CPU backend refuses of nodes that no constructor made, as a peer
// sends them over RPC; each with its reason on stderr.

#include "act_round/act_round.h"
#include "check.h"
#include "ext_assert.h"
#include "kron/kron.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

namespace {

void test_kron() {
    expect("x is F32",
           [](Tensors & t) { ggml_ext_kron(t.ctx, t.square(24, GGML_TYPE_F16), t.square(4), nullptr, 0, 1.0f); });
    expect("values of a row of x are adjacent",
           [](Tensors & t) { ggml_ext_kron(t.ctx, ggml_transpose(t.ctx, t.x), t.square(3), nullptr, 0, 1.0f); });
    expect("a factor is F32 or F16",
           [](Tensors & t) { ggml_ext_kron(t.ctx, t.x, t.square(4, GGML_TYPE_BF16), nullptr, 0, 1.0f); });
    expect("a factor is a square matrix", [](Tensors & t) {
        ggml_ext_kron(t.ctx, t.x, ggml_new_tensor_2d(t.ctx, GGML_TYPE_F32, 4, 6), nullptr, 0, 1.0f);
    });
    expect("a factor is contiguous",
           [](Tensors & t) { ggml_ext_kron(t.ctx, t.x, ggml_transpose(t.ctx, t.square(4)), nullptr, 0, 1.0f); });
    expect("a factor's order divides", [](Tensors & t) { ggml_ext_kron(t.ctx, t.x, nullptr, t.square(5), 0, 1.0f); });
    expect("orders multiply", [](Tensors & t) { ggml_ext_kron(t.ctx, t.x, t.square(4), t.square(3), 0, 1.0f); });
    expect("orders multiply", [](Tensors & t) { ggml_ext_kron(t.ctx, t.x, t.square(1), t.square(8), 0, 1.0f); });
    expect("orders multiply", [](Tensors & t) { ggml_ext_kron(t.ctx, t.x, t.square(4), nullptr, 8, 1.0f); });
    expect("power of two", [](Tensors & t) { ggml_ext_kron(t.ctx, t.x, t.square(4), nullptr, 6, 1.0f); });
    expect("power of two", [](Tensors & t) { ggml_ext_kron(t.ctx, t.x, t.square(4), nullptr, -2, 1.0f); });
    expect("order of hadamard divides", [](Tensors & t) { ggml_ext_kron(t.ctx, t.x, nullptr, nullptr, 16, 1.0f); });
    expect("takes the place of right", [](Tensors & t) { ggml_ext_kron(t.ctx, t.x, nullptr, t.square(8), 8, 1.0f); });
    expect("a factor or a clip", [](Tensors & t) { ggml_ext_kron(t.ctx, t.x, nullptr, nullptr, 1, 1.0f); });
    for (float clip : { 0.0f, -0.5f, 1.5f, (float) NAN }) {
        expect("clip is in (0, 1]", [=](Tensors & t) { ggml_ext_kron(t.ctx, t.x, t.square(4), nullptr, 0, clip); });
    }
}

void test_act_round() {
    expect("x is F32", [](Tensors & t) { ggml_ext_act_round(t.ctx, t.square(4, GGML_TYPE_F16), 4, 0); });
    expect("values of a row of x are adjacent",
           [](Tensors & t) { ggml_ext_act_round(t.ctx, ggml_transpose(t.ctx, t.x), 4, 0); });
    for (int bits : { 1, 9 }) {
        expect("bits is 2 to 8", [=](Tensors & t) { ggml_ext_act_round(t.ctx, t.x, bits, 0); });
    }
    expect("group is 0", [](Tensors & t) { ggml_ext_act_round(t.ctx, t.x, 4, -1); });
}

void test_sample() {
    const auto sample = [](Tensors & t, ggml_type type, int64_t n_vocab, int64_t words, int64_t n_rows) {
        ggml_ext_sample(t.ctx, ggml_new_tensor_2d(t.ctx, type, n_vocab, 3),
                        ggml_new_tensor_2d(t.ctx, GGML_TYPE_I32, words, n_rows), nullptr);
    };
    expect("logits is F32", [=](Tensors & t) { sample(t, GGML_TYPE_F16, 5, GGML_EXT_SAMPLE_WORDS, 3); });
    expect("logits is F32",
           [=](Tensors & t) { sample(t, GGML_TYPE_F32, GGML_EXT_SAMPLE_MAX_VOCAB + 1, GGML_EXT_SAMPLE_WORDS, 3); });
    expect("8 adjacent words", [=](Tensors & t) { sample(t, GGML_TYPE_F32, 5, 7, 3); });
    expect("8 adjacent words", [=](Tensors & t) { sample(t, GGML_TYPE_F32, 5, GGML_EXT_SAMPLE_WORDS, 2); });
    expect("ids is I32", [](Tensors & t) {
        ggml_ext_sample(t.ctx, t.x, ggml_new_tensor_2d(t.ctx, GGML_TYPE_I32, GGML_EXT_SAMPLE_WORDS, 3), t.square(24));
    });
}

std::vector<int32_t> kron_params(int32_t hadamard, float clip) {
    const ggml_ext_kron_params params = { hadamard, clip, 0 };
    std::vector<int32_t>       words(sizeof(params) / sizeof(int32_t));
    std::memcpy(words.data(), &params, sizeof(params));
    return words;
}

void test_nodes() {
    const auto kron = [](Tensors & t, ggml_tensor * x, ggml_tensor * left, int32_t hadamard) {
        return Node{
            GGML_EXT_OP_KRON, table(t, GGML_TYPE_F32, x ? x->ne[0] : 8, 3), { x, left },
                     kron_params(hadamard, 1)
        };
    };
    expect_node("power of two", [=](Tensors & t) { return kron(t, table(t, GGML_TYPE_F32, 130, 3), nullptr, 129); });
    expect_node("power of two", [=](Tensors & t) { return kron(t, t.x, nullptr, INT32_MIN); });
    expect_node("divides", [=](Tensors & t) { return kron(t, table(t, GGML_TYPE_F32, 130, 3), nullptr, 128); });
    expect_node("square", [=](Tensors & t) { return kron(t, t.x, table(t, GGML_TYPE_F32, 24, 1), 0); });
    expect_node("square", [=](Tensors & t) { return kron(t, t.x, table(t, GGML_TYPE_F32, 0, 0), 0); });
    expect_node("F32 or F16", [=](Tensors & t) { return kron(t, t.x, table(t, GGML_TYPE_Q8_0, 32, 32), 0); });
    expect_node("kron: x is F32", [=](Tensors & t) { return kron(t, nullptr, t.square(8), 0); });
    expect_node("shape of x", [](Tensors & t) {
        return Node{
            GGML_EXT_OP_KRON, table(t, GGML_TYPE_F32, 24, 9), { t.x, t.square(24) },
                 kron_params(0, 1)
        };
    });
    expect_node("bits is 2 to 8", [](Tensors & t) {
        return Node{
            GGML_EXT_OP_ACT_ROUND, table(t, GGML_TYPE_F32, 24, 3), { t.x },
                 { 0, 0 }
        };
    });
    expect_node("shape of x", [](Tensors & t) {
        return Node{
            GGML_EXT_OP_ACT_ROUND, table(t, GGML_TYPE_F32, 240, 3), { t.x },
                 { 4, 0 }
        };
    });
    expect_node("one shape", [](Tensors & t) {
        return Node{
            GGML_EXT_OP_SCALE_ADD, table(t, GGML_TYPE_F32, 24, 3), { t.x, t.square(2) },
                 { 0 }
        };
    });
    expect_node("shape of a", [](Tensors & t) {
        return Node{
            GGML_EXT_OP_SCALE_ADD, table(t, GGML_TYPE_F32, 48, 3), { t.x, t.x },
                 { 0 }
        };
    });
    expect_node("one value for each row", [](Tensors & t) {
        ggml_tensor * parameters = table(t, GGML_TYPE_I32, GGML_EXT_SAMPLE_WORDS, 3);
        return Node{
            GGML_EXT_OP_SAMPLE, table(t, GGML_TYPE_I32, 2, 1), { t.x, parameters },
                 {}
        };
    });
    expect_node("no such sub-op",
                [](Tensors & t) { return Node{ GGML_EXT_OP_COUNT, table(t, GGML_TYPE_F32, 24, 3), { t.x }, {} }; });
    CHECK(compute([=](Tensors & t) { return kron(t, t.x, t.square(3), 8); }) == "not refused",
          "a valid node is computed");
}

}  // namespace

int main() {
    setenv("GGML_NO_BACKTRACE", "1", 1);
    CHECK(refusal([](Tensors & t) { ggml_ext_kron(t.ctx, t.x, t.square(4), nullptr, 0, 1.0f); }, true) == "not refused",
          "a valid call passes");
    test_kron();
    test_act_round();
    test_sample();
    test_nodes();
    return check_done();
}
