// What the constructors of our ops refuse, and what the CPU backend refuses of nodes that no constructor made, as a peer
// sends them over RPC; each with its reason on stderr.

#include "act_round/act_round.h"
#include "check.h"
#include "core/ext_op.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include "kron/kron.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

namespace {

struct Tensors {
    explicit Tensors(bool no_alloc) : ctx(ggml_init({ 1024 * 1024, nullptr, no_alloc })) {}

    ggml_context * ctx;
    ggml_tensor *  x = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 24, 3);

    ggml_tensor * square(int64_t order, ggml_type type = GGML_TYPE_F32) {
        return ggml_new_tensor_2d(ctx, type, order, order);
    }
};

// The call aborts in a child process; its stderr comes back.
std::string refusal(const std::function<void(Tensors &)> & call, bool no_alloc) {
    int ends[2];
    if (pipe(ends) != 0) {
        return "no pipe";
    }
    const pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 2);
        close(ends[0]);
        Tensors tensors(no_alloc);
        call(tensors);
        _exit(0);
    }
    close(ends[1]);
    std::string text;
    char        buffer[4096];
    for (ssize_t n; (n = read(ends[0], buffer, sizeof(buffer))) > 0;) {
        text.append(buffer, n);
    }
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    return WIFSIGNALED(status) ? text : "not refused";
}

void expect_text(const char * reason, const std::string & text) {
    CHECK(text.find(reason) != std::string::npos, "\"%s\" is not in \"%s\"", reason, text.c_str());
}

void expect(const char * reason, const std::function<void(Tensors &)> & construct) {
    expect_text(reason, refusal(construct, true));
}

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

// A node as deserialised from a peer's bytes: nothing of it was checked.
struct Node {
    ggml_ext_op                op;
    ggml_tensor *              dst;
    std::vector<ggml_tensor *> src;
    std::vector<int32_t>       params;
};

std::string compute(const std::function<Node(Tensors &)> & make) {
    return refusal(
        [&](Tensors & t) {
            std::memset(t.x->data, 0, ggml_nbytes(t.x));
            const Node    node = make(t);
            const int32_t id   = node.op;
            node.dst->op       = GGML_OP_EXT;
            std::memcpy(node.dst->op_params, &id, sizeof(id));
            std::copy(node.params.begin(), node.params.end(), node.dst->op_params + 1);
            std::copy(node.src.begin(), node.src.end(), node.dst->src);
            ggml_set_name(node.dst, "crafted");
            ggml_cgraph * graph = ggml_new_graph(t.ctx);
            ggml_build_forward_expand(graph, node.dst);
            ggml_graph_compute_with_ctx(t.ctx, graph, 2);
        },
        false);
}

void expect_node(const char * reason, const std::function<Node(Tensors &)> & make) {
    const std::string text = compute(make);
    expect_text(reason, text);
    expect_text("tensor 'crafted'", text);
}

ggml_tensor * table(Tensors & t, ggml_type type, int64_t ne0, int64_t ne1) {
    return ggml_new_tensor_2d(t.ctx, type, ne0, ne1);
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

// One lane, one list of one run, one query; what differs comes from a peer.
struct Attend {
    std::vector<int32_t> table    = { 0, 1, 0, 1 << 16 };  // offsets, block 0, begin 0 and count 1
    int32_t              position = 0, cell = 0;
    std::vector<int32_t> order   = { 0, 1, 0 };
    int32_t              type    = GGML_TYPE_Q8_0;
    int64_t              block   = 256 + 2 * 64 * 34;
    int32_t              n_lists = 1;
    int64_t              n_cells = 4;
};

Node attend(Tensors & t, const Attend & a) {
    const auto integers = [&](const std::vector<int32_t> & values) {
        ggml_tensor * tensor = table(t, GGML_TYPE_I32, int64_t(values.size()), 1);
        std::memcpy(tensor->data, values.data(), ggml_nbytes(tensor));
        return tensor;
    };
    ggml_tensor * pool = table(t, GGML_TYPE_I8, a.block, 2);
    std::memset(pool->data, 0, ggml_nbytes(pool));
    std::memcpy(pool->data, &a.position, sizeof(a.position));
    ggml_tensor * q    = table(t, GGML_TYPE_F32, 32, 1);
    ggml_tensor * mask = table(t, GGML_TYPE_F16, a.n_cells, 1);
    std::memset(q->data, 0, ggml_nbytes(q));
    std::memset(mask->data, 0, ggml_nbytes(mask));
    const ggml_ext_kv_attend_params params = { a.type, a.type, 32, 32, 1, 0, a.n_lists, 1, 0, 0 };
    std::vector<int32_t>            words(sizeof(params) / sizeof(int32_t));
    std::memcpy(words.data(), &params, sizeof(params));
    return {
        GGML_EXT_OP_KV_ATTEND,
        table(t, GGML_TYPE_F32, 32, 1),
        { q, pool, integers(a.table), integers({ a.cell }), integers(a.order), mask },
        words
    };
}

void expect_attend(const char * reason, const std::function<void(Attend &)> & change) {
    expect_text(reason, compute([&](Tensors & t) {
                    Attend a;
                    change(a);
                    return attend(t, a);
                }));
}

void test_kv() {
    expect_attend("not refused", [](Attend &) {});
    expect_attend("q8_0, q5_0, q4_0, iq4_nl or f16", [](Attend & a) { a.type = GGML_TYPE_Q2_K; });
    expect_attend("q8_0, q5_0, q4_0, iq4_nl or f16", [](Attend & a) { a.type = 4; });  // a type that is gone
    expect_attend("that the rows fit in", [](Attend & a) { a.block = 256; });
    expect_attend("that the rows fit in", [](Attend & a) { a.block += 4; });
    expect_attend("a lane's lists hold", [](Attend & a) { a.n_lists = 0; });
    expect_attend("an offset per list", [](Attend & a) { a.n_lists = 4; });
    expect_attend("order is I32", [](Attend & a) { a.order.push_back(0); });
    // What only the data says.
    expect_attend("a run of a block", [](Attend & a) { a.table[2] = 2; });
    expect_attend("a run of a block", [](Attend & a) { a.table[2] = -1; });
    expect_attend("a run of a block", [](Attend & a) { a.table[3] = 65 << 16; });
    expect_attend("a run of a block", [](Attend & a) { a.table[3] = 2 << 16 | 63; });
    expect_attend("the table's sums", [](Attend & a) { a.table[1] = 2; });
    expect_attend("the lists' offsets", [](Attend & a) { a.table = { 0, 2, 1, 0, 1 << 16 }, a.n_lists = 2; });
    expect_attend("the table's sums", [](Attend & a) { a.order[1] = 2; });
    expect_attend("a token", [](Attend & a) { a.order[2] = 1; });
    expect_attend("a position", [](Attend & a) { a.position = 1; });
    expect_attend("a cell", [](Attend & a) { a.cell = 4; });
    expect_attend("a cell", [](Attend & a) { a.cell = -1; });

    const auto store = [](int32_t type, int32_t offset, int32_t slot, int64_t n_slots) {
        return compute([=](Tensors & t) {
            ggml_tensor * pool  = table(t, GGML_TYPE_I8, 256 + 64 * 34, 2);
            ggml_tensor * slots = table(t, GGML_TYPE_I32, 1, n_slots);
            ggml_tensor * x     = ggml_new_tensor_3d(t.ctx, GGML_TYPE_F32, 32, 1, 1);
            std::memset(x->data, 0, ggml_nbytes(x));
            std::fill_n((int32_t *) slots->data, n_slots, slot);
            return Node{
                GGML_EXT_OP_KV_STORE, ggml_view_tensor(t.ctx, pool), { pool, x, slots },
                   { type, offset }
            };
        });
    };
    expect_text("not refused", store(GGML_TYPE_Q8_0, 256, 127, 1));
    expect_text("a slot of the pool", store(GGML_TYPE_Q8_0, 256, 128, 1));
    expect_text("a slot of the pool", store(GGML_TYPE_Q8_0, 256, -1, 1));
    expect_text("slots is I32", store(GGML_TYPE_Q8_0, 256, 0, 2));
    expect_text("that the rows fit in", store(GGML_TYPE_Q8_0, 320, 0, 1));
    expect_text("that the rows fit in", store(GGML_TYPE_Q8_0, -64, 0, 1));
    expect_text("the type's blocks divide", store(GGML_TYPE_Q4_K, 256, 0, 1));
    expect_text("the type's blocks divide", store(-1, 256, 0, 1));

    // score: where; channels: of the keys, 0: none.
    const auto scored = [](int32_t score, int64_t channels) {
        return compute([=](Tensors & t) {
            ggml_tensor * pool  = table(t, GGML_TYPE_I8, 256 + 64 * 34 + 256, 2);
            ggml_tensor * slots = table(t, GGML_TYPE_I32, 1, 1);
            ggml_tensor * x     = ggml_new_tensor_3d(t.ctx, GGML_TYPE_F32, 32, 1, 1);
            ggml_tensor * keys  = channels ? ggml_new_tensor_3d(t.ctx, GGML_TYPE_F32, channels, 1, 1) : nullptr;
            std::memset(x->data, 0, ggml_nbytes(x));
            std::memset(slots->data, 0, ggml_nbytes(slots));
            return Node{
                GGML_EXT_OP_KV_STORE,
                ggml_view_tensor(t.ctx, pool),
                { pool, x, slots, nullptr, keys },
                { GGML_TYPE_Q8_0, 256, score }
            };
        });
    };
    expect_text("not refused", scored(256 + 64 * 34, 32));
    expect_text("the scores fit", scored(256 + 64 * 34 + 4, 32));
    expect_text("the scores fit", scored(258, 32));
    expect_text("the scores fit", scored(-4, 32));
    expect_text("the scores fit", scored(0, 32));
    expect_text("not refused", scored(256 + 64 * 34, 1));
    expect_text("keys is as x", scored(256 + 64 * 34, 64));
    expect_text("keys is as x", scored(256, 0));
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
    test_kv();
    return check_done();
}
