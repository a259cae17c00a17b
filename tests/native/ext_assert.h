// Constructors that abort in a child process, and nodes that no constructor made.

#pragma once

#include "check.h"
#include "core/ext_op.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

struct Tensors {
    explicit Tensors(bool no_alloc) : ctx(ggml_init({ 1024 * 1024, nullptr, no_alloc })) {}

    ggml_context * ctx;
    ggml_tensor *  x = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 24, 3);

    ggml_tensor * square(int64_t order, ggml_type type = GGML_TYPE_F32) {
        return ggml_new_tensor_2d(ctx, type, order, order);
    }
};

// The call aborts in a child process; its stderr comes back.
inline std::string refusal(const std::function<void(Tensors &)> & call, bool no_alloc) {
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

inline void expect_text(const char * reason, const std::string & text) {
    CHECK(text.find(reason) != std::string::npos, "\"%s\" is not in \"%s\"", reason, text.c_str());
}

inline void expect(const char * reason, const std::function<void(Tensors &)> & construct) {
    expect_text(reason, refusal(construct, true));
}

// A node as deserialised from a peer's bytes: nothing of it was checked.
struct Node {
    ggml_ext_op                op;
    ggml_tensor *              dst;
    std::vector<ggml_tensor *> src;
    std::vector<int32_t>       params;
};

inline std::string compute(const std::function<Node(Tensors &)> & make) {
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

inline void expect_node(const char * reason, const std::function<Node(Tensors &)> & make) {
    const std::string text = compute(make);
    expect_text(reason, text);
    expect_text("tensor 'crafted'", text);
}

inline ggml_tensor * table(Tensors & t, ggml_type type, int64_t ne0, int64_t ne1) {
    return ggml_new_tensor_2d(t.ctx, type, ne0, ne1);
}
