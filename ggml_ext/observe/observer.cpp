// The observer: an eval callback that reads activations where the walk says. ggml-ext.h documents the functions.
//
// Why an input is still there after the product that reads it: ggml_backend_sched_compute_splits (ggml-backend.cpp) runs
// the nodes up to one that was asked for, and calls back before it submits the next. The allocator hands memory on at the
// last node that reads it, and a product never writes over its inputs.

#include "observer.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>

namespace {

// A tensor's bytes where the processor can read them.
class readable {
  public:
    explicit readable(const ggml_tensor * tensor) {
        ggml_backend_buffer_t buffer = tensor->view_src ? tensor->view_src->buffer : tensor->buffer;
        if (ggml_backend_buffer_is_host(buffer)) {
            data = static_cast<const char *>(tensor->data);
            return;
        }
        copy.resize(ggml_nbytes(tensor));
        ggml_backend_tensor_get(tensor, copy.data(), 0, copy.size());
        data = copy.data();
    }

    const char * data;

  private:
    std::vector<char> copy;
};

double median(std::vector<double> values) {
    const auto middle = values.begin() + (values.size() - 1) / 2;
    std::nth_element(values.begin(), middle, values.end());
    return *middle;
}

// One value's rows, the token of each, and the rows of each expert.
struct dealt {
    ggml_ext_rows                    all;
    std::vector<int64_t>             token;
    std::vector<std::vector<size_t>> experts;
};

dealt deal(const ggml_tensor * x, const char * data, const ggml_tensor * product, const char * ids, int64_t n_experts) {
    dealt result;
    result.all.n = x->ne[0];
    result.experts.resize(n_experts);
    const bool    routed  = product->op == GGML_OP_MUL_MAT_ID;
    const int64_t per_one = n_experts && !routed ? x->ne[2] / product->src[0]->ne[2] : 1;
    for (int64_t i3 = 0; i3 < x->ne[3]; i3++) {
        for (int64_t i2 = 0; i2 < x->ne[2]; i2++) {
            for (int64_t i1 = 0; i1 < x->ne[1]; i1++) {
                if (n_experts && !routed && product->src[0]->ne[2] > 1) {
                    result.experts[i2 / per_one].push_back(result.all.at.size());
                }
                // Experts read [n, slots, tokens], heads [n, tokens, heads, streams], others all rows of all streams.
                const int64_t flat = (i3 * x->ne[2] + i2) * x->ne[1] + i1;
                result.token.push_back(routed ? i2 : product->src[0]->ne[2] > 1 ? i3 * x->ne[1] + i1 : flat);
                result.all.at.push_back(
                    reinterpret_cast<const float *>(data + i1 * x->nb[1] + i2 * x->nb[2] + i3 * x->nb[3]));
            }
        }
    }
    if (routed) {
        const ggml_tensor * which = product->src[2];
        for (int64_t t = 0; t < which->ne[1]; t++) {
            for (int64_t slot = 0; slot < which->ne[0]; slot++) {
                const int32_t expert = *reinterpret_cast<const int32_t *>(ids + slot * which->nb[0] + t * which->nb[1]);
                if (expert >= 0 && expert < n_experts) {
                    result.experts[expert].push_back(t * x->ne[1] + slot % x->ne[1]);
                }
            }
        }
    }
    return result;
}

ggml_ext_rows some(const ggml_ext_rows & all, const std::vector<size_t> & which) {
    ggml_ext_rows rows;
    rows.n = all.n;
    for (const size_t i : which) {
        rows.at.push_back(all.at[i]);
        rows.scale.push_back(all.scale[i]);
    }
    return rows;
}

float count(const std::vector<float> & weights) {
    double sum = 0;
    for (const float weight : weights) {
        sum += weight;
    }
    return float(sum);
}

}  // namespace

ggml_ext_observer::ggml_ext_observer(int n_threads) : summer(n_threads) {}

void ggml_ext_observer::walk(const llama_model & model, ggml_cgraph * gf, const ggml_ext_online & online) {
    table = ggml_ext_walk(model, gf, online);
    json  = ggml_ext_table_json(table);
    stale = !sums.empty() && anchors() != agreed;
    if (stale) {
        fail(GGML_EXT_E_SHAPE, table.sites.size());
    }
}

std::vector<std::string> ggml_ext_observer::anchors() const {
    std::vector<std::string> found;
    for (const ggml_ext_observed & site : table.sites) {
        found.push_back(site.anchor + " " + std::to_string(site.n) + " " + std::to_string(site.n_experts));
    }
    return found;
}

void ggml_ext_observer::fail(int32_t code, size_t site) {
    if (error == 0) {
        error   = code;
        culprit = site < table.sites.size() ? table.sites[site].anchor : "";
    }
}

bool ggml_ext_observer::wants(const ggml_tensor * node) const {
    const auto found = table.at.find(node);
    return error == 0 && found != table.at.end() &&
           std::any_of(found->second.begin(), found->second.end(), [this](size_t i) {
               return table.values[i].site < sums.size() && sums[table.values[i].site].after;
           });
}

void ggml_ext_observer::see(const ggml_tensor * node) {
    for (const size_t i : table.at.at(node)) {
        const ggml_ext_value & value = table.values[i];
        if (value.site < sums.size() && sums[value.site].after) {
            add(value, node);
        }
    }
}

void ggml_ext_observer::add(const ggml_ext_value & value, const ggml_tensor * node) {
    const ggml_ext_observed & site    = table.sites[value.site];
    ggml_ext_site_sums &      into    = sums[value.site];
    const ggml_tensor *       product = value.product;
    const ggml_tensor *       x       = node == product ? product->src[1] : node;
    if (x->type != GGML_TYPE_F32 || x->nb[0] != sizeof(float) || x->ne[0] != site.n) {
        return fail(GGML_EXT_E_SHAPE, value.site);
    }
    const bool     routed = product->op == GGML_OP_MUL_MAT_ID;
    const readable data(x), ids(routed ? product->src[2] : x);
    dealt          rows   = deal(x, data.data, product, ids.data, site.n_experts);
    const auto     powers = summer.powers(rows.all);
    if (powers.size() != rows.all.at.size() || powers.empty()) {
        return fail(GGML_EXT_E_MEMORY, value.site);
    }
    for (const double power : powers) {
        if (!std::isfinite(power)) {
            return fail(GGML_EXT_E_FINITE, value.site);
        }
    }
    const double       limit = largest > 0 ? double(largest) * median(powers) : 0;
    std::vector<float> counted;
    for (size_t r = 0; r < powers.size(); r++) {
        const float weight = weights && rows.token[r] < n_tokens ? weights[rows.token[r]] : 1.0f;
        const bool  large  = limit > 0 && powers[r] > limit;
        rows.all.scale.push_back(std::sqrt(weight * (large ? float(limit / powers[r]) : 1.0f)));
        counted.push_back(weight);
    }

    const int64_t n_experts = site.n_experts;
    const bool    diagonal  = into.moments == GGML_EXT_MOMENTS_NONE;
    const int64_t size      = diagonal ? site.n : ggml_ext_moment_size(site.n);
    const bool    first     = !touched[value.site];
    const float * before    = first ? into.before : into.after;
    float *       after     = into.after;
    const auto    previous  = [&](int64_t at) { return before ? before[at] : 0.0f; };
    after[0]                = previous(0) + count(counted);
    for (int64_t e = 0; e < n_experts; e++) {
        float its = 0;
        for (const size_t r : rows.experts[e]) {
            its += counted[r];
        }
        after[1 + e] = previous(1 + e) + its;
    }
    int64_t    at     = 1 + n_experts;
    const auto from   = [&]() { return before ? before + at : nullptr; };
    int32_t    status = diagonal ? summer.add_diagonal(rows.all, from(), after + at) :
                                   summer.add_moment(rows.all, from(), after + at, into.absmax);
    at += size;
    for (int64_t e = 0; e < n_experts && status == 0; e++, at += site.n) {
        status = summer.add_diagonal(some(rows.all, rows.experts[e]), from(), after + at);
    }
    const int64_t n_own = into.moments == GGML_EXT_MOMENTS_OWN ? n_experts : 0;
    for (int64_t e = 0; e < n_own && status == 0; e++, at += size) {
        status = summer.add_moment(some(rows.all, rows.experts[e]), from(), after + at, nullptr);
    }
    if (status != 0) {
        return fail(status, value.site);
    }
    if (first && into.sample && !keep_sample(into, rows.all)) {
        return fail(GGML_EXT_E_SHAPE, value.site);
    }
    touched[value.site] = true;
    n_seen++;
}

bool ggml_ext_observer::keep_sample(const ggml_ext_site_sums & into, const ggml_ext_rows & x) const {
    const int64_t n_rows = int64_t(x.at.size());
    const int64_t start  = first_token * (n_rows / std::max<int64_t>(n_tokens, 1));
    for (int64_t r = (into.sample_stride - start % into.sample_stride) % into.sample_stride; r < n_rows;
         r += into.sample_stride) {
        const int64_t at = (start + r) / into.sample_stride;
        if (at >= into.sample_rows) {
            return false;
        }
        for (int64_t c = 0; c < x.n; c++) {
            into.sample[at * x.n + c] = x.at[r][c] * x.scale[r];
        }
    }
    return true;
}

int64_t ggml_ext_observer::n_wanted() const {
    return std::count_if(table.values.begin(), table.values.end(), [this](const ggml_ext_value & value) {
        return value.site < sums.size() && sums[value.site].after;
    });
}

ggml_ext_observer * ggml_ext_observer_new(int32_t n_threads) {
    try {
        auto * observer = new ggml_ext_observer(std::max(n_threads, 1));
        if (observer->summer.ready()) {
            return observer;
        }
        delete observer;
    } catch (const std::exception &) {  // out of memory
    }
    return nullptr;
}

void ggml_ext_observer_free(ggml_ext_observer * observer) {
    delete observer;
}

const char * ggml_ext_observer_table(const ggml_ext_observer * observer) {
    return observer->json.empty() ? nullptr : observer->json.c_str();
}

int64_t ggml_ext_observer_size(int64_t n, int64_t n_experts, int32_t moments) {
    if (n < 1 || n_experts < 0 || moments < GGML_EXT_MOMENTS_NONE || moments > GGML_EXT_MOMENTS_OWN) {
        return GGML_EXT_E_SHAPE;
    }
    const int64_t moment = moments == GGML_EXT_MOMENTS_NONE ? n : ggml_ext_moment_size(n);
    return 1 + n_experts + moment + n_experts * n + (moments == GGML_EXT_MOMENTS_OWN ? n_experts * moment : 0);
}

int32_t ggml_ext_observer_sums(ggml_ext_observer * observer, int64_t n_sites, const ggml_ext_site_sums * sums) {
    if (n_sites != int64_t(observer->table.sites.size())) {
        return GGML_EXT_E_SHAPE;
    }
    try {
        observer->sums.assign(sums, sums + n_sites);
        observer->agreed = observer->anchors();
        observer->stale  = false;
    } catch (const std::exception &) {
        return GGML_EXT_E_MEMORY;
    }
    return 0;
}

int32_t ggml_ext_observer_begin(ggml_ext_observer * observer, int64_t first_token, int64_t n_tokens, float largest,
                                const float * weights) {
    if (first_token < 0 || n_tokens < 1) {
        return GGML_EXT_E_SHAPE;
    }
    try {
        observer->touched.assign(observer->sums.size(), false);
    } catch (const std::exception &) {
        return GGML_EXT_E_MEMORY;
    }
    observer->first_token = first_token;
    observer->n_tokens    = n_tokens;
    observer->largest     = largest;
    observer->weights     = weights;
    observer->n_seen      = 0;
    observer->error       = observer->stale ? GGML_EXT_E_SHAPE : 0;
    observer->culprit.clear();
    return 0;
}

bool ggml_ext_observer_eval(ggml_tensor * tensor, bool ask, void * user_data) {
    ggml_ext_observer & observer = *static_cast<ggml_ext_observer *>(user_data);
    if (ask) {
        return observer.wants(tensor);
    }
    try {
        observer.see(tensor);
    } catch (const std::exception &) {
        observer.fail(GGML_EXT_E_MEMORY, observer.table.sites.size());
    }
    // Behind the last site this split ends, so that the next product, the head's, is not computed. After an error the
    // abort callback ends all splits.
    return observer.error != 0 || !ggml_ext_observer_done(user_data);
}

bool ggml_ext_observer_done(void * user_data) {
    const ggml_ext_observer & observer = *static_cast<const ggml_ext_observer *>(user_data);
    return observer.error != 0 || (observer.n_seen > 0 && observer.n_seen >= observer.n_wanted());
}

int64_t ggml_ext_observer_end(ggml_ext_observer * observer) {
    return observer->error != 0 ? observer->error :
                                  std::count(observer->touched.begin(), observer->touched.end(), true);
}

const char * ggml_ext_observer_culprit(const ggml_ext_observer * observer) {
    return observer->culprit.c_str();
}
