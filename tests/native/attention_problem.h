// Attention problems as llama.cpp poses them to GGML_OP_FLASH_ATTN_EXT.
//
// Every tensor has an allocation of exactly its own size, so that AddressSanitizer sees a read past its end. What a
// kernel must not read is filled with bytes 0xff, a NaN in every type: the cache behind n_kv, spare rows of the mask,
// the work buffer and the result.

#pragma once

#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace attention {

enum Mask { NO_MASK, CAUSAL, RANDOM };

enum Layout {
    CONTIGUOUS,  // [d, n_kv, heads, batch]
    SPARE_ROWS,  // the same with room for more positions behind n_kv
    CACHE,       // llama.cpp's: [d, heads, positions, batch], permuted; q is [d, heads, n_q, batch], permuted
};

enum Outliers {
    NONE,
    SCALED,  // three channels of K are multiplied by 50
    SHIFTED  // 50 is added to three channels of K, as in models whose keys have a large mean
};

struct Case {
    int64_t   dk, dv, n_kv, n_q, heads_kv, gqa;
    ggml_type k, v;
    Mask      mask       = CAUSAL;
    Layout    layout     = CACHE;
    int64_t   batch      = 1;
    int64_t   mask_heads = 1;
    bool      sinks      = false;
    float     max_bias   = 0.0f;
    float     softcap    = 0.0f;
    Outliers  outliers   = NONE;
    bool      v_in_k     = false;  // V is the first dv channels of K
    bool      sink_token = false;  // position 0 takes about half of every row, the rest is flat
    unsigned  seed       = 1;

    std::string text() const {
        char s[320];
        std::snprintf(s, sizeof(s),
                      "dk %d dv %d n_kv %d n_q %d heads %dx%d batch %d K %s V %s mask %d/%d layout %d sinks %d bias %g "
                      "softcap %g outliers %d v_in_k %d sink token %d",
                      (int) dk, (int) dv, (int) n_kv, (int) n_q, (int) heads_kv, (int) gqa, (int) batch,
                      ggml_type_name(k), ggml_type_name(v), mask, (int) mask_heads, layout, sinks, max_bias, softcap,
                      outliers, v_in_k, sink_token);
        return s;
    }
};

class Problem {
  public:
    explicit Problem(const Case & spec) : c(spec), rng(spec.seed) {
        const ggml_init_params params = { 256 * 1024 + 2 * ggml_graph_overhead(), nullptr, true };
        ctx.reset(ggml_init(params));
        const int64_t      heads = c.heads_kv * c.gqa;
        std::vector<float> values;

        normal(values, c.dk * c.n_q * heads * c.batch);
        if (c.sink_token) {
            std::fill(values.begin(), values.end(), 0.02f);
        }
        ggml_tensor * whole = c.layout == CACHE ? tensor(GGML_TYPE_F32, c.dk, heads, c.n_q, c.batch) :
                                                  tensor(GGML_TYPE_F32, c.dk, c.n_q, heads, c.batch);
        std::memcpy(whole->data, values.data(), ggml_nbytes(whole));
        q = c.layout == CACHE ? ggml_permute(ctx.get(), whole, 0, 2, 1, 3) : whole;

        k = cache(c.k, c.dk, true);
        v = c.v_in_k ? ggml_view_4d(ctx.get(), k, c.dv, c.n_kv, c.heads_kv, c.batch, k->nb[1], k->nb[2], k->nb[3], 0) :
                       cache(c.v, c.dv, false);
        if (c.mask != NO_MASK) {
            make_mask();
        }
        if (c.sinks) {
            sinks = tensor(GGML_TYPE_F32, heads, 1, 1, 1);
            for (int64_t h = 0; h < heads; h++) {
                ((float *) sinks->data)[h] = std::uniform_real_distribution<float>(-2.0f, 5.0f)(rng);
            }
        }
        out = ggml_flash_attn_ext(ctx.get(), q, k, v, mask, scale(), c.max_bias, c.softcap);
        ggml_flash_attn_ext_add_sinks(out, sinks);
        own(out);
    }

    float scale() const { return 1.0f / std::sqrt((float) c.dk); }

    // Bit patterns of the result differ between calls only if the kernel's do.
    std::vector<float> compute(int n_threads, bool use_ref = false) {
        std::memset(out->data, 0xff, ggml_nbytes(out));
        ggml_cgraph * graph = ggml_new_graph_custom(ctx.get(), 8, false);
        ggml_build_forward_expand(graph, out);
        ggml_cplan           plan = ggml_graph_plan(graph, n_threads, nullptr);
        std::vector<uint8_t> work(plan.work_size, 0xff);
        plan.work_data = work.data();
        plan.use_ref   = use_ref;
        if (ggml_graph_compute(graph, &plan) != GGML_STATUS_SUCCESS) {
            return {};
        }
        const float * values = (const float *) out->data;
        return std::vector<float>(values, values + ggml_nelements(out));
    }

    const Case    c;
    ggml_tensor * q;
    ggml_tensor * k;
    ggml_tensor * v;
    ggml_tensor * mask  = nullptr;
    ggml_tensor * sinks = nullptr;
    ggml_tensor * out;

  private:
    struct Free {
        void operator()(ggml_context * p) const { ggml_free(p); }

        void operator()(void * p) const { std::free(p); }
    };

    void own(ggml_tensor * t) {
        void * data = nullptr;
        if (posix_memalign(&data, 64, ggml_nbytes(t))) {
            std::abort();
        }
        std::memset(data, 0xff, ggml_nbytes(t));
        allocations.emplace_back(data);
        t->data = data;
    }

    ggml_tensor * tensor(ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3) {
        ggml_tensor * t = ggml_new_tensor_4d(ctx.get(), type, ne0, ne1, ne2, ne3);
        own(t);
        return t;
    }

    void normal(std::vector<float> & values, int64_t n) {
        std::normal_distribution<float> dist;
        values.resize(n);
        std::generate(values.begin(), values.end(), [&] { return dist(rng); });
    }

    void make_row(std::vector<float> & row, int64_t d, int64_t position, bool keys) {
        normal(row, d);
        for (int64_t i = 1; keys && c.outliers != NONE && i < d; i += d / 3) {
            row[i] = c.outliers == SCALED ? 50.0f * row[i] : 50.0f + row[i];
        }
        if (c.sink_token) {
            // With q constant the scores are scale * 0.02 * d * k: 0 for the tail, log(n_kv - 1) for position 0.
            const float first = std::log((float) (c.n_kv - 1)) / (scale() * 0.02f * (float) c.dk);
            for (float & x : row) {
                x = keys ? (position == 0 ? first : 0.0f) : (position == 0 ? 0.05f * x : 1.0f + 0.2f * x);
            }
        }
    }

    ggml_tensor * cache(ggml_type type, int64_t d, bool keys) {
        const int64_t size         = c.layout == CONTIGUOUS ? c.n_kv : c.n_kv + 5;
        const bool    heads_inside = c.layout == CACHE;
        ggml_tensor * whole =
            heads_inside ? tensor(type, d, c.heads_kv, size, c.batch) : tensor(type, d, size, c.heads_kv, c.batch);
        ggml_tensor *      view = heads_inside ? ggml_permute(ctx.get(),
                                                              ggml_view_4d(ctx.get(), whole, d, c.heads_kv, c.n_kv, c.batch,
                                                                           whole->nb[1], whole->nb[2], whole->nb[3], 0),
                                                              0, 2, 1, 3) :
                                                 ggml_view_4d(ctx.get(), whole, d, c.n_kv, c.heads_kv, c.batch, whole->nb[1],
                                                              whole->nb[2], whole->nb[3], 0);
        std::vector<float> row;
        for (int64_t b = 0; b < c.batch; b++) {
            for (int64_t h = 0; h < c.heads_kv; h++) {
                for (int64_t j = 0; j < c.n_kv; j++) {
                    make_row(row, d, j, keys);
                    char * to = (char *) view->data + j * view->nb[1] + h * view->nb[2] + b * view->nb[3];
                    ggml_quantize_chunk(type, row.data(), to, 0, 1, d, nullptr);
                }
            }
        }
        return view;
    }

    // CAUSAL: the last row sees everything; with max_bias the values are -distance, as llama.cpp's ALiBi mask has
    // them. RANDOM: a third is -inf, the rest arbitrary; row 0 and every fifth row are masked completely.
    void make_mask() {
        mask = tensor(GGML_TYPE_F16, c.n_kv, c.n_q + 3, c.mask_heads, c.batch);
        std::normal_distribution<float> dist;
        for (int64_t b = 0; b < c.batch; b++) {
            for (int64_t h = 0; h < c.mask_heads; h++) {
                for (int64_t i = 0; i < c.n_q; i++) {
                    ggml_fp16_t * row =
                        (ggml_fp16_t *) ((char *) mask->data + i * mask->nb[1] + h * mask->nb[2] + b * mask->nb[3]);
                    for (int64_t j = 0; j < c.n_kv; j++) {
                        const int64_t ahead  = j - (c.n_kv - c.n_q + i);
                        const bool    hidden = c.mask == CAUSAL ? ahead > 0 : i % 5 == 0 || rng() % 3 == 0;
                        const float   value  = c.mask == RANDOM ? dist(rng) :
                                               c.max_bias > 0   ? -std::fabs((float) ahead) :
                                                                  0.0f;
                        row[j]               = ggml_fp32_to_fp16(hidden ? -INFINITY : value);
                    }
                }
            }
        }
    }

    std::mt19937                             rng;
    std::unique_ptr<ggml_context, Free>      ctx;
    std::vector<std::unique_ptr<void, Free>> allocations;
};

}  // namespace attention
