// How a context's budget becomes the cells of its caches, and which models can have one.

#include "budget.h"

#include "attention/setting.h"
#include "hooks.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-kv-cells.h"
#include "llama-model.h"
#include "setting.h"
#include "transform/transform.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <exception>
#include <optional>
#include <stdexcept>
#include <string>

namespace {

// What upstream rounds contexts to, and what its graphs grow by.
constexpr uint32_t cells_step = 256;

// Beyond, whatever the policy, much of what was said is gone.
constexpr uint32_t most_compression = 8;

// Their memory holds more than K and V of each position, or is shared with another context's.
const char * const other_memories[] = {
    "minimax-m3", "glm-dsa",   "deepseek32", "deepseek4", "glm5-next",
    "hy_v4",      "dots3note", "qwen4exp",   "dflash",    "gemma4-assistant",
};

struct kv_scope {
    const llama_model * model = nullptr;
    ggml_ext_kv_setting setting;
    uint32_t            n_seq_max = 0;
    uint32_t            n_ubatch  = 0;
    int                 n_threads = 1;
    bool                opened    = false;
};

thread_local std::optional<kv_scope> kv_current;

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
        kv_refuse("a cache of architecture " + arch + " cannot have a budget or be paged; unset it");
    }
    if (model.hparams.n_pos_per_embd() > 1) {
        kv_refuse("positions of several dimensions (architecture " + arch +
                  ") cannot have a budget or be paged; unset it");
    }
    if (!scope.setting.paged) {
        // Upstream's server counts a sliding window as lost in front of a cut.
        scope.setting.recent = std::max(scope.setting.recent, model.hparams.n_swa + 1);
    }
    scope.model     = &model;
    scope.n_seq_max = cparams.n_seq_max;
    scope.n_ubatch  = cparams.n_ubatch;
    scope.n_threads = cparams.n_threads_batch;
    kv_current      = scope;
}

ggml_ext_kv_scope::~ggml_ext_kv_scope() {
    if (kv_current && !kv_current->opened && std::uncaught_exceptions() == 0) {
        LLAMA_LOG_WARN(
            "%s: ggml-ext: this model has no cache that GGML_EXT_KV could act on; its memory is llama.cpp's\n",
            __func__);
    }
    kv_current.reset();
}

// Policy window: fewer cells.
static std::shared_ptr<ggml_ext_kv> kv_open_window(std::vector<llama_kv_cells> & cells, uint32_t & kv_size) {
    const ggml_ext_kv_setting & setting   = kv_current->setting;
    const uint32_t              sequences = kv_current->n_seq_max / uint32_t(cells.size());
    const double   wanted = setting.share > 0 ? setting.share * kv_size : double(setting.tokens) * sequences;
    const uint32_t budget = std::min<double>(kv_size, GGML_PAD(uint64_t(wanted), uint64_t(cells_step)));
    if (budget == kv_size) {
        LLAMA_LOG_INFO("%s: ggml-ext: the budget covers all %u cells; nothing is evicted\n", __func__, kv_size);
        return nullptr;
    }
    const uint64_t least = uint64_t(sequences) * (uint64_t(setting.sink) + setting.recent) + kv_current->n_ubatch;
    if (budget < least) {
        kv_refuse("a budget of " + std::to_string(budget) + " cells is less than " + std::to_string(sequences) +
                  " x (sink " + std::to_string(setting.sink) + " + recent " + std::to_string(setting.recent) + ") + " +
                  std::to_string(kv_current->n_ubatch) + " for -ub; raise it or lower them");
    }
    // A warning, since llama-server shows no less by itself.
    LLAMA_LOG_WARN(
        "%s: ggml-ext: policy window: %u cells for %u sequences and %u positions, sink %u, recent %u at least\n",
        __func__, budget, sequences, kv_size, setting.sink, setting.recent);
    kv_size = budget;
    for (llama_kv_cells & stream : cells) {
        stream.resize(kv_size);
    }
    auto ext    = std::make_shared<ggml_ext_kv>();
    ext->sink   = llama_pos(setting.sink);
    ext->recent = llama_pos(setting.recent);
    ext->n_seq  = sequences;
    return ext;
}

// The device that a paged cache's layer would be on, if it is not the CPU's; else null.
static const char * kv_other_device(const llama_model & model, bool offload) {
    for (uint32_t il = 0; offload && il < model.hparams.n_layer(); ++il) {
        const ggml_backend_dev_t device = model.dev_layer(int(il));
        if (ggml_backend_dev_type(device) != GGML_BACKEND_DEVICE_TYPE_CPU) {
            return ggml_backend_dev_name(device);
        }
    }
    return nullptr;
}

static std::shared_ptr<ggml_ext_kv> kv_open_paged(ggml_type type_k, ggml_type type_v, bool v_trans, bool offload,
                                                  uint32_t n_stream, uint32_t & kv_size) {
    const llama_model & model = *kv_current->model;
    for (const ggml_type type : { type_k, type_v }) {
        if (type != GGML_TYPE_Q8_0 && type != GGML_TYPE_Q4_0 && type != GGML_TYPE_Q5_0 && type != GGML_TYPE_IQ4_NL &&
            type != GGML_TYPE_F16) {
            kv_refuse(std::string("paged storage has no kernels for a cache of type ") + ggml_type_name(type) +
                      "; take -ctk and -ctv of q8_0, q5_0, q4_0, iq4_nl or f16");
        }
    }
    if (kv_current->setting.cold > 0) {
        if (type_k != GGML_TYPE_Q8_0 || type_v != GGML_TYPE_Q8_0) {
            kv_refuse("codes are made of a cache of type q8_0; take -ctk q8_0 -ctv q8_0");
        }
        if (kv_current->setting.policy == ggml_ext_kv_policy::attention) {
            kv_refuse("codes have no scores of policy attention; take policy=probe, norm or random, or none");
        }
    }
    if (v_trans) {
        kv_refuse("paged storage needs flash attention; take -fa on");
    }
    if (model.hparams.is_mla()) {
        kv_refuse(std::string("a latent cache (architecture ") + model.arch_name() + ") cannot be paged; unset it");
    }
    if (ggml_ext_attention_setting().mode == GGML_EXT_ATTENTION_OFF) {
        kv_refuse("paged attention is computed in 8-bit integers; unset GGML_EXT_ATTN=off");
    }
    if (const char * device = kv_other_device(model, offload)) {
        if (kv_current->setting.is_bounded()) {
            kv_refuse(std::string("paged storage is for the CPU, and layers are on ") + device +
                      "; take a budget without 'paged', or -ngl 0");
        }
        LLAMA_LOG_WARN("%s: ggml-ext: paged storage is for the CPU; layers are on %s, so the cache stays llama.cpp's\n",
                       __func__, device);
        return nullptr;
    }
    auto ext   = std::make_shared<ggml_ext_kv>();
    ext->paged = std::make_unique<ggml_ext_kv_paged>(kv_size, n_stream, kv_current->setting, kv_current->n_seq_max,
                                                     kv_current->n_threads);
    kv_size    = 1;
    return ext;
}

std::shared_ptr<ggml_ext_kv> ggml_ext_kv_open(ggml_type type_k, ggml_type type_v, bool v_trans, bool offload,
                                              bool sliding, std::vector<llama_kv_cells> & cells, uint32_t & kv_size) {
    if (!kv_current || sliding) {
        return nullptr;
    }
    kv_current->opened = true;
    const std::shared_ptr<ggml_ext_kv> ext =
        kv_current->setting.paged ? kv_open_paged(type_k, type_v, v_trans, offload, uint32_t(cells.size()), kv_size) :
                                    kv_open_window(cells, kv_size);
    if (ext) {
        ext->cells = &cells;
    }
    return ext;
}

bool ggml_ext_kv_will_code() {
    return kv_current && kv_current->setting.cold > 0;
}

// A layer's codebooks; null where the setting wants none.
static ggml_tensor * kv_books(uint32_t il) {
    const int channels = kv_current->setting.cold;
    if (channels == 0) {
        return nullptr;
    }
    const auto & known = kv_current->model->ggml_ext;
    if (known && known->codebooks.layers.count(channels) && known->codebooks.layers.at(channels)[il]) {
        return known->codebooks.layers.at(channels)[il];
    }
    kv_refuse(std::string("the model has no codebooks of ") + (channels == 4 ? "2 bits" : "1 bit") + " of layer " +
              std::to_string(il) + "; make them with 'ggml-ext kv-codebook'");
}

void ggml_ext_kv_add_layer(ggml_ext_kv & ext, uint32_t il, const ggml_tensor * k, const ggml_tensor * v) {
    const llama_hparams & hparams = kv_current->model->hparams;
    const auto &          known   = kv_current->model->ggml_ext;
    if (ext.paged->policy() == ggml_ext_kv_policy::probe &&
        (!known || known->probes.layers.size() <= il || !known->probes.layers[il].weight)) {
        kv_refuse("the model has no probe of layer " + std::to_string(il) +
                  "; make probes with 'ggml-ext kv-probe', or take policy=norm");
    }
    ext.paged->add({ int32_t(hparams.n_embd_head_k(il)), int32_t(hparams.n_embd_head_v(il)),
                     int32_t(hparams.n_head_kv(il)), k->type, v->type, 0, il, 0 },
                   k, v, kv_books(il));
}

static std::string kv_policy(const ggml_ext_kv_setting & setting) {
    if (setting.policy == ggml_ext_kv_policy::keep) {
        return "nothing is evicted";
    }
    return std::string("policy ") + ggml_ext_kv_policy_name(setting.policy) + ", sink " + std::to_string(setting.sink) +
           ", recent " + std::to_string(setting.recent) + " stay";
}

// Blocks of each list: rows', and codes'.
struct kv_blocks {
    uint64_t rows = 0, codes = 0;
};

// Without eviction or codes, `least` is one ubatch; of all of the context's cells it is `full`.
static kv_blocks kv_blocks_of(const ggml_ext_kv_paged & paged, const ggml_ext_kv_setting & setting, uint64_t full,
                              uint64_t least) {
    const uint64_t cells  = uint64_t(paged.n_cells) * paged.n_stream;
    const double   tokens = double(setting.tokens) * double(kv_current->n_seq_max);
    kv_blocks      n      = { full, 0 };
    if (!paged.cold()) {
        if (setting.bytes > 0) {
            n.rows = setting.bytes / paged.list_size();
        } else if (setting.share > 0 || setting.tokens > 0) {
            n.rows =
                uint64_t(std::ceil((setting.share > 0 ? setting.share * double(cells) : tokens) / GGML_EXT_KV_SLOTS));
        }
        n.rows = std::min(n.rows, full);
        return n;
    }
    // What is old is coded when rows are short, so they are as few as can be; of several sequences one more, for that to
    // be seldom. Of the codes each sequence may leave a block open, and packing one more.
    const uint64_t open = kv_current->n_seq_max + 1;
    const uint64_t list = paged.cold()->block_bytes() * paged.n_lists();
    n                   = { least + (kv_current->n_seq_max > 1), full + open };
    if (setting.tokens > 0) {
        n.codes = std::min(n.codes, uint64_t(std::ceil(tokens / GGML_EXT_KV_SLOTS)) + open);
    } else if (setting.share > 0 || setting.bytes > 0) {
        const double bytes =
            setting.bytes > 0 ? double(setting.bytes) : setting.share * double(full) * double(paged.list_size());
        const double left = bytes - double(n.rows) * double(paged.list_size());
        n.codes           = std::min(n.codes, uint64_t(std::max(0.0, left) / double(list)));
    }
    if (n.codes < n.rows + open) {
        kv_refuse("a budget of " + std::to_string(n.codes) + " blocks of 64 coded tokens beside " +
                  std::to_string(n.rows) + " of rows is less than " + std::to_string(n.rows + open) +
                  "; raise it, or lower -ub, sink or recent");
    }
    return n;
}

static void kv_log(const ggml_ext_kv_paged & paged, const ggml_ext_kv_setting & setting, const kv_blocks & n,
                   uint64_t full) {
    const uint64_t    cells = uint64_t(paged.n_cells) * paged.n_stream;
    const uint64_t    room  = std::min((n.rows + n.codes) * GGML_EXT_KV_SLOTS, cells);
    const std::string codes = paged.cold() ? " and " + std::to_string(n.codes) + " of 64 codes of " +
                                                 (setting.cold == 4 ? "2 bits" : "1 bit") + ", sink " +
                                                 std::to_string(setting.sink) + ", recent " +
                                                 std::to_string(setting.recent) + " stay as they are," :
                                             "";
    LLAMA_LOG_WARN(
        "%s: ggml-ext: paged: %.2f MiB, %llu blocks of 64 tokens%s for each of %u heads, room for %llu of %llu "
        "tokens; %s\n",
        __func__, double(paged.size()) / 1024 / 1024, (unsigned long long) n.rows, codes.c_str(), paged.n_lists(),
        (unsigned long long) room, (unsigned long long) cells, kv_policy(setting).c_str());
    if (paged.evicts() && (n.rows + n.codes) * most_compression < full) {
        LLAMA_LOG_WARN("%s: ggml-ext: a full context keeps less than 1 of %u tokens: what is said once in it will be "
                       "forgotten; docs/kv-cache.md has what is left at which budget\n",
                       __func__, most_compression);
    }
}

void ggml_ext_kv_allocate(ggml_ext_kv & ext) {
    ggml_ext_kv_paged &         paged   = *ext.paged;
    const ggml_ext_kv_setting & setting = kv_current->setting;
    if (paged.n_lists() == 0) {  // a hybrid model may have no layer with attention
        LLAMA_LOG_WARN("%s: ggml-ext: this model has no layer with attention; GGML_EXT_KV changes nothing\n", __func__);
        return;
    }
    const uint64_t cells    = uint64_t(paged.n_cells) * paged.n_stream;
    // With all of the cells to itself each sequence may leave a block open.
    const uint64_t open     = paged.n_stream == 1 ? kv_current->n_seq_max - 1 : 0;
    const uint64_t full     = (cells + GGML_EXT_KV_SLOTS - 1) / GGML_EXT_KV_SLOTS + open;
    const uint32_t n_ubatch = kv_current->n_ubatch;
    if (paged.attended() && !ggml_ext_kv_paged::scores_by(n_ubatch)) {
        kv_refuse("policy attention scores by a ubatch's queries, and " + std::to_string(n_ubatch) +
                  " are too few; raise -ub to 8 or more");
    }
    const bool     makes_room = paged.evicts() || paged.cold();
    const uint64_t least =
        makes_room ? paged.least_blocks(n_ubatch) : (n_ubatch + GGML_EXT_KV_SLOTS - 1) / GGML_EXT_KV_SLOTS;
    const kv_blocks n = kv_blocks_of(paged, setting, full, least);
    if (n.rows < least) {
        kv_refuse(
            "a budget of " + std::to_string(n.rows) + " blocks of 64 tokens is less than " + std::to_string(least) +
            " for -ub " + std::to_string(n_ubatch) +
            (makes_room ? ", sinks and recent tokens of " + std::to_string(kv_current->n_seq_max) + " sequences" : "") +
            "; raise it or lower -ub");
    }
    paged.allocate(n.rows, n.codes, !kv_current->model->hparams.no_alloc);
    kv_log(paged, setting, n, full);
}
