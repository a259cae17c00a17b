// What the constructors of our ops refuse, each with its reason on stderr.

#include "check.h"
#include "ggml.h"
#include "ops/ext-op.h"

#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <functional>
#include <string>

namespace {

struct Tensors {
    ggml_context * ctx = ggml_init({ 1024 * 1024, nullptr, true });
    ggml_tensor *  x   = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 24, 3);

    ggml_tensor * square(int64_t order, ggml_type type = GGML_TYPE_F32) {
        return ggml_new_tensor_2d(ctx, type, order, order);
    }
};

// The constructor aborts in a child process; its stderr comes back.
std::string refusal(const std::function<void(Tensors &)> & construct) {
    int ends[2];
    if (pipe(ends) != 0) {
        return "no pipe";
    }
    const pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 2);
        close(ends[0]);
        Tensors tensors;
        construct(tensors);
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

void expect(const char * reason, const std::function<void(Tensors &)> & construct) {
    const std::string text = refusal(construct);
    CHECK(text.find(reason) != std::string::npos, "\"%s\" is not in \"%s\"", reason, text.c_str());
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

}  // namespace

int main() {
    setenv("GGML_NO_BACKTRACE", "1", 1);
    CHECK(refusal([](Tensors & t) { ggml_ext_kron(t.ctx, t.x, t.square(4), nullptr, 0, 1.0f); }) == "not refused",
          "a valid call passes");
    test_kron();
    test_act_round();
    return check_done();
}
