// How a context's budget becomes the cells of its caches, and which models can have one.

#include "budget.h"

#include "hooks.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-model.h"
#include "setting.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace {

// What upstream rounds contexts to, and what its graphs grow by.
constexpr uint32_t cells_step = 256;

// Their memory holds more than K and V of each position, or is shared with another context's.
const char * const other_memories[] = {
    "minimax-m3", "glm-dsa",   "deepseek32", "deepseek4", "glm5-next",
    "hy_v4",      "dots3note", "qwen4exp",   "dflash",    "gemma4-assistant",
};

struct kv_scope {
    ggml_ext_kv_setting setting;
    uint32_t            n_seq_max = 0;
    uint32_t            n_ubatch  = 0;
};

thread_local const kv_scope * kv_current = nullptr;

[[noreturn]] void kv_refuse(const std::string & reason) {
    throw std::runtime_error("ggml-ext: environment variable GGML_EXT_KV: " + reason);
}

}  // namespace

ggml_ext_kv_scope::ggml_ext_kv_scope(const llama_model & model, const llama_cparams & cparams) {
    const char * value = std::getenv("GGML_EXT_KV");
    kv_scope     scope;
    if (!ggml_ext_kv_parse(value, scope.setting)) {
        kv_refuse("is '" + std::string(value) + "'; set it to " GGML_EXT_KV_VALUES);
    }
    if (!scope.setting.on) {
        return;
    }
    const std::string arch = model.arch_name();
    if (std::find(std::begin(other_memories), std::end(other_memories), arch) != std::end(other_memories)) {
        kv_refuse("a cache of architecture " + arch + " cannot have a budget; unset it");
    }
    if (model.hparams.n_pos_per_embd() > 1) {
        kv_refuse("positions of several dimensions (architecture " + arch + ") cannot have a budget; unset it");
    }
    // Upstream's server counts a sliding window as lost in front of a cut.
    scope.setting.recent = std::max(scope.setting.recent, model.hparams.n_swa + 1);
    scope.n_seq_max      = cparams.n_seq_max;
    scope.n_ubatch       = cparams.n_ubatch;
    kv_current           = new kv_scope(scope);
}

ggml_ext_kv_scope::~ggml_ext_kv_scope() {
    delete kv_current;
    kv_current = nullptr;
}

std::shared_ptr<ggml_ext_kv> ggml_ext_kv_open(uint32_t n_stream, bool sliding, uint32_t & kv_size) {
    if (!kv_current || sliding) {
        return nullptr;
    }
    const ggml_ext_kv_setting & setting   = kv_current->setting;
    const uint32_t              sequences = kv_current->n_seq_max / n_stream;
    const double   wanted = setting.share > 0 ? setting.share * kv_size : double(setting.tokens) * sequences;
    const uint32_t cells  = std::min<double>(kv_size, GGML_PAD(uint64_t(wanted), uint64_t(cells_step)));
    if (cells == kv_size) {
        LLAMA_LOG_INFO("%s: ggml-ext: the budget covers all %u cells; nothing is evicted\n", __func__, kv_size);
        return nullptr;
    }
    const uint64_t least = uint64_t(sequences) * (setting.sink + setting.recent) + kv_current->n_ubatch;
    if (cells < least) {
        kv_refuse("a budget of " + std::to_string(cells) + " cells is less than " + std::to_string(sequences) +
                  " x (sink " + std::to_string(setting.sink) + " + recent " + std::to_string(setting.recent) + ") + " +
                  std::to_string(kv_current->n_ubatch) + " for -ub; raise it or lower them");
    }
    // A warning, since llama-server shows no less by itself.
    LLAMA_LOG_WARN(
        "%s: ggml-ext: policy window: %u cells for %u sequences and %u positions, sink %u, recent %u at least\n",
        __func__, cells, sequences, kv_size, setting.sink, setting.recent);
    kv_size = cells;
    return std::make_shared<ggml_ext_kv>(ggml_ext_kv{ llama_pos(setting.sink), llama_pos(setting.recent), sequences });
}
