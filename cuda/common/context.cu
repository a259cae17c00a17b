#include "context.h"
#include "ext-cuda.h"

#include <map>
#include <mutex>

struct all_states {
    std::mutex                                                       mutex;
    std::map<const ggml_backend_cuda_context *, ggml_ext_cuda_state> of;  // nodes never move
};

// Never destroyed: a context may outlive the destructors of static variables.
static all_states & states() {
    static all_states & all = *new all_states;
    return all;
}

static bool same(const struct ggml_ext_attention_setting & a, const struct ggml_ext_attention_setting & b) {
    return a.mode == b.mode && a.f16 == b.f16 && a.smooth == b.smooth && a.fast == b.fast;
}

// Makes upstream look at the nodes again, find another graph, and capture anew when that has come twice.
static void forget_captured([[maybe_unused]] ggml_backend_cuda_context & ctx) {
#ifdef USE_CUDA_GRAPH
    for (auto & [key, graph] : ctx.cuda_graphs) {
        graph->uid = 0;
        graph->node_props.clear();
    }
#endif
}

ggml_ext_cuda_state & ggml_ext_cuda_state_of(const ggml_backend_cuda_context & ctx) {
    std::lock_guard<std::mutex> lock(states().mutex);
    const auto [state, is_new] = states().of.try_emplace(&ctx);
    if (is_new) {
        state->second.attention = ggml_ext_attention_setting();
    }
    return state->second;
}

void ggml_ext_cuda_check_settings(ggml_backend_cuda_context & ctx) {
    ggml_ext_cuda_state &                   state = ggml_ext_cuda_state_of(ctx);
    const struct ggml_ext_attention_setting now   = ggml_ext_attention_setting();
    if (!same(state.attention, now)) {
        state.attention = now;
        forget_captured(ctx);
    }
}

void ggml_ext_cuda_graph_begin(ggml_backend_cuda_context & ctx) {
    ggml_ext_cuda_state & state = ggml_ext_cuda_state_of(ctx);
    for (ggml_ext_activation_slots & slots : state.streams) {
        slots.forget();
    }
    state.unwritten.clear();
}

void ggml_ext_cuda_free(ggml_backend_cuda_context & ctx) {
    std::lock_guard<std::mutex> lock(states().mutex);
    const auto                  state = states().of.find(&ctx);
    if (state == states().of.end()) {
        return;
    }
    ggml_cuda_set_device(ctx.device);
    for (const ggml_ext_activation_slots & slots : state->second.streams) {
        for (void * memory : slots.allocated()) {
            CUDA_CHECK(cudaFree(memory));
        }
    }
    states().of.erase(state);
}
