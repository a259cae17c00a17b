// The products run through ggml, on its threads and with its kernels. x^T x is a product of the transposed rows with
// themselves, so they are transposed first; of each panel only what is right of the diagonal is computed.

#include "moments.h"

#include "ggml-alloc.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace {

constexpr int64_t panel = GGML_EXT_MOMENT_PANEL;
constexpr int64_t pad   = 16;    // ggml's fast products want row lengths that are multiples of a vector
constexpr int64_t tile  = 32;    // channels that one thread transposes at a time
constexpr int64_t chunk = 2048;  // rows of one float32 sum, which bounds its error

struct part {
    int64_t first, last;
};

part part_of(int64_t n, int64_t step, int ith, int nth) {
    const int64_t tiles = (n + step - 1) / step;
    return { std::min(n, tiles * ith / nth * step), std::min(n, tiles * (ith + 1) / nth * step) };
}

struct transpose {
    const ggml_ext_rows * x;
    int64_t               first, count;  // rows
    float *               absmax;
};

// dst [padded rows, n]: the scaled rows, transposed; zeros behind them.
void transpose_op(ggml_tensor * dst, int ith, int nth, void * user_data) {
    const transpose & its    = *static_cast<const transpose *>(user_data);
    const int64_t     stride = dst->ne[0];
    const part        range  = part_of(its.x->n, tile, ith, nth);
    for (int64_t c0 = range.first; c0 < range.last; c0 += tile) {
        const int64_t c1 = std::min(c0 + tile, range.last);
        for (int64_t r0 = 0; r0 < its.count; r0 += pad) {
            const int64_t r1 = std::min(r0 + pad, its.count);
            for (int64_t c = c0; c < c1; c++) {
                float * out = static_cast<float *>(dst->data) + c * stride;
                for (int64_t r = r0; r < r1; r++) {
                    out[r] = its.x->at[its.first + r][c] * its.x->scale[its.first + r];
                }
            }
        }
        for (int64_t c = c0; c < c1; c++) {
            float * out = static_cast<float *>(dst->data) + c * stride;
            std::fill(out + its.count, out + stride, 0.0f);
            if (its.absmax) {
                float largest = its.absmax[c];
                for (int64_t r = 0; r < its.count; r++) {
                    largest = std::max(largest, std::fabs(out[r]));
                }
                its.absmax[c] = largest;
            }
        }
    }
}

struct addition {
    const float * before;  // null: zeros
    float *       after;
};

void add_op(ggml_tensor * dst, int ith, int nth, void * user_data) {
    const addition & its     = *static_cast<const addition *>(user_data);
    const float *    product = static_cast<const float *>(dst->src[0]->data);
    const part       range   = part_of(ggml_nelements(dst->src[0]), 1024, ith, nth);
    for (int64_t i = range.first; i < range.last; i++) {
        its.after[i] = (its.before ? its.before[i] : 0.0f) + product[i];
    }
}

struct squares {
    const ggml_ext_rows * x;
    double *              powers;
};

void power_op(ggml_tensor *, int ith, int nth, void * user_data) {
    const squares & its   = *static_cast<const squares *>(user_data);
    const part      range = part_of(int64_t(its.x->at.size()), 16, ith, nth);
    for (int64_t r = range.first; r < range.last; r++) {
        const float * x   = its.x->at[r];
        double        sum = 0;
        for (int64_t c0 = 0; c0 < its.x->n; c0 += 64) {
            float lanes[8] = {};
            for (int64_t c = c0; c < std::min(c0 + 64, its.x->n); c++) {
                lanes[c % 8] += x[c] * x[c];
            }
            for (const float lane : lanes) {
                sum += lane;
            }
        }
        its.powers[r] = sum;
    }
}

struct diagonal {
    const ggml_ext_rows * x;
    const float *         before;  // null: zeros
    float *               after;
};

// Sums of `short_sum` rows are added to each other, which bounds their error.
void diagonal_op(ggml_tensor *, int ith, int nth, void * user_data) {
    constexpr int64_t short_sum = 64;
    const diagonal &  its       = *static_cast<const diagonal *>(user_data);
    const int64_t     n_rows    = int64_t(its.x->at.size());
    const part        range     = part_of(its.x->n, tile, ith, nth);
    for (int64_t c0 = range.first; c0 < range.last; c0 += tile) {
        const int64_t width      = std::min(tile, range.last - c0);
        float         sums[tile] = {};
        for (int64_t r0 = 0; r0 < n_rows; r0 += short_sum) {
            float short_sums[tile] = {};
            for (int64_t r = r0; r < std::min(r0 + short_sum, n_rows); r++) {
                const float * x     = its.x->at[r] + c0;
                const float   scale = its.x->scale[r] * its.x->scale[r];
                for (int64_t c = 0; c < width; c++) {
                    short_sums[c] += scale * x[c] * x[c];
                }
            }
            for (int64_t c = 0; c < width; c++) {
                sums[c] += short_sums[c];
            }
        }
        for (int64_t c = 0; c < width; c++) {
            its.after[c0 + c] = (its.before ? its.before[c0 + c] : 0.0f) + sums[c];
        }
    }
}

ggml_context_ptr context(size_t n_tensors) {
    const ggml_init_params params = { n_tensors * ggml_tensor_overhead() + ggml_graph_overhead_custom(n_tensors, false),
                                      nullptr, /*no_alloc=*/true };
    return ggml_context_ptr(ggml_init(params));
}

}  // namespace

int64_t ggml_ext_moment_size(int64_t n) {
    int64_t size = 0;
    for (int64_t i = 0; i < n; i += panel) {
        size += std::min(panel, n - i) * (n - i);
    }
    return size;
}

ggml_ext_summer::ggml_ext_summer(int n_threads) :
    backend(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr)) {
    if (!backend) {
        return;
    }
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend.get()));
    if (auto * set_n_threads = reinterpret_cast<ggml_backend_set_n_threads_t>(
            ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads"))) {
        set_n_threads(backend.get(), n_threads);
    }
    allocator.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend.get())));
}

bool ggml_ext_summer::compute(ggml_cgraph * graph) {
    return ggml_gallocr_alloc_graph(allocator.get(), graph) &&
           ggml_backend_graph_compute(backend.get(), graph) == GGML_STATUS_SUCCESS;
}

bool ggml_ext_summer::call(ggml_custom_op_t op, void * its) {
    ggml_context_ptr ctx   = context(2);
    ggml_cgraph *    graph = ggml_new_graph_custom(ctx.get(), 2, false);
    ggml_build_forward_expand(
        graph, ggml_custom_4d(ctx.get(), GGML_TYPE_F32, 1, 1, 1, 1, nullptr, 0, op, GGML_N_TASKS_MAX, its));
    return compute(graph);
}

std::vector<double> ggml_ext_summer::powers(const ggml_ext_rows & x) {
    std::vector<double> result(x.at.size());
    squares             its = { &x, result.data() };
    return call(power_op, &its) ? result : std::vector<double>();
}

int32_t ggml_ext_summer::add_diagonal(const ggml_ext_rows & x, const float * before, float * after) {
    diagonal its = { &x, before, after };
    return call(diagonal_op, &its) ? 0 : GGML_EXT_E_MEMORY;
}

int32_t ggml_ext_summer::add_moment(const ggml_ext_rows & x, const float * before, float * after, float * absmax) {
    const int64_t n_rows   = int64_t(x.at.size());
    const int64_t n_panels = (x.n + panel - 1) / panel;
    if (n_rows == 0) {
        if (before != after) {
            const int64_t size = ggml_ext_moment_size(x.n);
            before ? (void) std::copy(before, before + size, after) : std::fill(after, after + size, 0.0f);
        }
        return 0;
    }
    for (int64_t first = 0; first < n_rows; first += chunk) {
        const int64_t         count = std::min(chunk, n_rows - first);
        transpose             rows  = { &x, first, count, absmax };
        std::vector<addition> sums;
        sums.reserve(n_panels);
        const size_t     n_tensors = 1 + 4 * size_t(n_panels);
        ggml_context_ptr ctx       = context(n_tensors);
        ggml_cgraph *    graph     = ggml_new_graph_custom(ctx.get(), n_tensors, false);
        const int64_t    padded    = GGML_PAD(count, pad);
        ggml_tensor * transposed = ggml_custom_4d(ctx.get(), GGML_TYPE_F32, padded, x.n, 1, 1, nullptr, 0, transpose_op,
                                                  GGML_N_TASKS_MAX, &rows);
        int64_t       offset     = 0;
        for (int64_t i = 0; i < x.n; i += panel) {
            const int64_t height  = std::min(panel, x.n - i);
            const size_t  at      = i * transposed->nb[1];
            ggml_tensor * right   = ggml_view_2d(ctx.get(), transposed, padded, x.n - i, transposed->nb[1], at);
            ggml_tensor * own     = ggml_view_2d(ctx.get(), transposed, padded, height, transposed->nb[1], at);
            ggml_tensor * product = ggml_mul_mat(ctx.get(), right, own);
            sums.push_back({ before ? before + offset : nullptr, after + offset });
            ggml_build_forward_expand(graph, ggml_custom_4d(ctx.get(), GGML_TYPE_F32, 1, 1, 1, 1, &product, 1, add_op,
                                                            GGML_N_TASKS_MAX, &sums.back()));
            offset += height * (x.n - i);
        }
        if (!compute(graph)) {
            return GGML_EXT_E_MEMORY;
        }
        before = after;
    }
    return 0;
}
