// The fused sampler as a llama_sampler; ggml-ext.h documents the functions, select.h the method.

#include "backend.h"
#include "generator.h"
#include "ggml-ext.h"
#include "llama-impl.h"
#include "llama.h"
#include "select.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <exception>
#include <new>
#include <random>
#include <vector>

namespace {

using namespace ggml_ext_sampling;

uint32_t random_seed() {
    std::random_device device;
    // An entropy of 0 stands for a generator that starts the same way in every process.
    return device.entropy() > 0 ? device() : uint32_t(std::chrono::system_clock::now().time_since_epoch().count());
}

generator seeded(const ggml_ext_sampler_params & params) {
    return generator(params.seed != LLAMA_DEFAULT_SEED ? params.seed : random_seed());
}

struct fused_sampler {
    ggml_ext_sampler_params params;
    generator               random;
    selection<rules>        select{ kernels_best() };
    std::vector<float>      logits;                        // of the array of candidates
    ggml_tensor *           backend_parameters = nullptr;  // input of the present graph

    // Stands behind llama_token_data_array::data when no token could be chosen: callers that read data[selected]
    // without a look at `selected` then get no token either.
    llama_token_data nothing[1];

    explicit fused_sampler(const ggml_ext_sampler_params & params) : params(params), random(seeded(params)) {}

    int32_t draw() { return select.draw(random.uniform()); }
};

fused_sampler & fused(const llama_sampler * sampler) {
    return *static_cast<fused_sampler *>(sampler->ctx);
}

void log_once(const char * what) {
    static std::atomic<bool> logged{ false };
    if (!logged.exchange(true)) {
        LLAMA_LOG_ERROR("ggml-ext: fused sampler: no token, %s\n", what);
    }
}

void leave_nothing(fused_sampler & self, llama_token_data_array * array, const char * why) {
    log_once(why);
    self.nothing[0] = { LLAMA_TOKEN_NULL, 0, 0 };
    array->data     = self.nothing + 1;
    array->size     = 0;
    array->selected = -1;
    array->sorted   = false;
}

bool by_id(const llama_token_data & a, const llama_token_data & b) {
    return a.id < b.id;
}

// Starts the selection on an array of candidates, which is sorted by the ids where it is not yet; as candidates::start.
bool start(fused_sampler & self, llama_token_data_array & array) {
    static_assert(sizeof(llama_token_data) == 12 && offsetof(llama_token_data, logit) == 4, "layout of `unpack`");
    const kernels & k           = kernels_best();
    const int32_t * words       = &array.data->id;
    bool            consecutive = true;
    self.logits.resize(array.size);
    const auto read = [&](int32_t i, int n) {
        consecutive &= k.unpack(words + size_t(i) * 3, words[0] + i, n, self.logits.data() + i);
    };
    const bool               started = self.select.start(self.logits.data(), int32_t(array.size), read);
    llama_token_data * const end     = array.data + array.size;
    if (consecutive || std::is_sorted(array.data, end, by_id)) {
        return started;
    }
    std::sort(array.data, end, by_id);
    return self.select.start(self.logits.data(), int32_t(array.size), read);
}

// Puts the kept candidates in front; their places ascend, so none is overwritten before it is read.
void write(fused_sampler & self, llama_token_data_array & array) {
    const candidates & kept = self.select.kept();
    const float        t    = float(kept.temperature());
    self.select.probabilities([&](int32_t first, int n, const float * p) {
        float logits[block_size];
        for (int i = 0; i < n; i++) {
            logits[i] = kept.logits()[first + i] / t;
        }
        for (int i = 0; i < n; i++) {
            array.data[first + i] = { array.data[kept.id(first + i)].id, logits[i], p[i] };
        }
    });
    array.size   = size_t(kept.size());
    array.sorted = false;
}

void apply(llama_sampler * sampler, llama_token_data_array * array) {
    fused_sampler & self = fused(sampler);
    if (array->size == 0) {
        array->selected = -1;
        return;
    }
    try {
        if (!start(self, *array)) {
            return leave_nothing(self, array, "a logit is NaN or +Inf, or none is finite");
        }
        self.select.run_stages(self.params);
        array->selected = self.draw();
        write(self, *array);
    } catch (const std::bad_alloc &) {
        leave_nothing(self, array, "out of memory");
    }
}

void reset(llama_sampler * sampler) {
    fused(sampler).random = seeded(fused(sampler).params);
}

llama_sampler * clone(const llama_sampler * sampler) {
    llama_sampler * result = ggml_ext_sampler_fused(&fused(sampler).params);
    if (result) {
        fused(result).random = fused(sampler).random;
    }
    return result;
}

// llama.cpp rolls back random numbers of rejected outputs for its own sampler only, so one output per sequence.
bool backend_init(llama_sampler * sampler, ggml_backend_buffer_type_t buft, uint32_t n_outputs) {
    const char * why =
        n_outputs > 1 ? "a sequence may have more than one output" : backend_obstacle(fused(sampler).params, buft);
    if (why) {
        LLAMA_LOG_WARN("ggml-ext: fused sampler: on the processor, not on a backend: %s\n", why);
    }
    return !why;
}

void backend_apply(llama_sampler * sampler, ggml_context * ctx, ggml_cgraph *, llama_sampler_data * data) {
    fused(sampler).backend_parameters = backend_add(ctx, data);
}

void backend_set_input(llama_sampler * sampler) {
    fused_sampler & self = fused(sampler);
    backend_set(self.backend_parameters, self.params, self.random.uniform());
}

void copy_state(const llama_sampler * source, llama_sampler * target) {
    fused(target).random = fused(source).random;
}

// The interface has grown from release to release of llama.cpp: backend_init got the number of outputs, copy_state came.
[[maybe_unused]] void set_backend_init(bool (*&field)(llama_sampler *, ggml_backend_buffer_type_t, uint32_t)) {
    field = backend_init;
}

[[maybe_unused]] void set_backend_init(bool (*&field)(llama_sampler *, ggml_backend_buffer_type_t)) {
    field = [](llama_sampler * sampler, ggml_backend_buffer_type_t buft) { return backend_init(sampler, buft, 1); };
}

template <class T> auto set_copy_state(T & i, int) -> decltype(i.copy_state, void()) {
    i.copy_state = copy_state;
}

template <class T> void set_copy_state(T &, long) {}

llama_sampler_i * interface() {
    static llama_sampler_i table = [] {
        llama_sampler_i i   = {};
        i.name              = [](const llama_sampler *) { return "fused"; };
        i.apply             = apply;
        i.reset             = reset;
        i.clone             = clone;
        i.free              = [](llama_sampler * sampler) { delete &fused(sampler); };
        i.backend_apply     = backend_apply;
        i.backend_set_input = backend_set_input;
        set_backend_init(i.backend_init);
        set_copy_state(i, 0);
        return i;
    }();
    return &table;
}

const char * problem(const ggml_ext_sampler_params & params) {
    for (const float value : { params.temperature, params.top_p, params.min_p, params.typical_p }) {
        if (!std::isfinite(value)) {
            return "a parameter is not finite";
        }
    }
    if (params.n_stages < 0 || params.n_stages > 8) {
        return "n_stages is not in 0 .. 8";
    }
    bool seen[GGML_EXT_SAMPLER_TEMPERATURE + 1] = {};
    for (int32_t i = 0; i < params.n_stages; i++) {
        const int32_t stage = params.stages[i];
        if (stage < 0 || stage > GGML_EXT_SAMPLER_TEMPERATURE) {
            return "unknown stage";
        }
        if (seen[stage]) {
            return "a stage is listed twice";
        }
        seen[stage] = true;
    }
    return nullptr;
}

// Runs the selection for one of the functions on plain logits; 0 or an error.
int32_t select_logits(const llama_sampler * sampler, const float * logits, int32_t n_vocab) {
    if (!sampler || sampler->iface != interface() || !logits) {
        return GGML_EXT_E_TYPE;
    }
    if (n_vocab < 1) {
        return GGML_EXT_E_SHAPE;
    }
    try {
        fused_sampler & self = fused(sampler);
        return self.select.run(logits, n_vocab, self.params) ? 0 : GGML_EXT_E_FINITE;
    } catch (const std::bad_alloc &) {
        return GGML_EXT_E_MEMORY;
    }
}

}  // namespace

llama_sampler * ggml_ext_sampler_fused(const ggml_ext_sampler_params * params) {
    const char * wrong = params ? problem(*params) : "no parameters";
    if (wrong) {
        LLAMA_LOG_ERROR("ggml-ext: fused sampler: %s\n", wrong);
        return nullptr;
    }
    try {
        return llama_sampler_init(interface(), new fused_sampler(*params));
    } catch (const std::exception & error) {
        LLAMA_LOG_ERROR("ggml-ext: fused sampler: %s\n", error.what());
        return nullptr;
    }
}

int32_t ggml_ext_sampler_sample_logits(llama_sampler * sampler, const float * logits, int32_t n_vocab) {
    const int32_t error = select_logits(sampler, logits, n_vocab);
    if (error) {
        return error;
    }
    fused_sampler & self = fused(sampler);
    return self.select.kept().id(self.draw());
}

int32_t ggml_ext_sampler_kept(llama_sampler * sampler, const float * logits, int32_t n_vocab, int32_t * ids,
                              float * probs) {
    const int32_t error = ids && probs ? select_logits(sampler, logits, n_vocab) : int32_t(GGML_EXT_E_TYPE);
    if (error) {
        return error;
    }
    fused_sampler & self = fused(sampler);
    self.select.probabilities([&](int32_t first, int n, const float * p) {
        std::copy(p, p + n, probs + first);
        for (int i = 0; i < n; i++) {
            ids[first + i] = self.select.kept().id(first + i);
        }
    });
    return self.select.kept().size();
}

int64_t ggml_ext_sampler_seed(const llama_sampler * sampler) {
    return sampler && sampler->iface == interface() ? int64_t(fused(sampler).random.seed()) : int64_t(GGML_EXT_E_TYPE);
}
