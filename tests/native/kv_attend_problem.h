// A pool with random rows, lists of runs and queries, and what attention over them is in double.

#pragma once

#include "check.h"
#include "core/ext_op.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include "kv_codes.h"
#include "kv_store/block.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

namespace kv {

struct Case {
    ggml_type type_k = GGML_TYPE_Q8_0, type_v = GGML_TYPE_Q8_0;
    int       dk = 64, dv = 64, n_head_kv = 2, gqa = 3;
    int       n_layer = 2, n_lane = 3, n_stream = 1;
    int       n_query  = 5;    // per stream
    int       n_cells  = 512;  // columns of the mask
    int       n_keys   = 0;    // as the op has it
    float     max_bias = 0, cap = 0;
    bool      sinks = false, mask_heads = false;
    bool      whole  = false;  // lists of whole blocks: position = cell, and so the bits of a plain cache
    bool      shared = false;  // lane 1 holds what lane 0 does
    CodesOf   codes;           // with channels about half of the runs are codes
};

struct Slot {
    int32_t            slot;
    int                position;
    std::vector<float> k, v;          // as the pool holds them
    bool               code = false;  // slot is one of the codes' pool
};

inline double error(const std::vector<float> & a, const std::vector<float> & b) {
    double distance = 0, size = 0;
    for (size_t i = 0; i < b.size(); ++i) {
        if (!std::isfinite(a[i])) {
            return INFINITY;
        }
        distance += std::pow(double(a[i]) - b[i], 2);
        size += std::pow(double(b[i]), 2);
    }
    return std::sqrt(distance / size);
}

struct Problem {
    explicit Problem(const Case & c, unsigned seed) :
        c(c), random(seed), block(ggml_ext_kv_block_of(c.type_k, c.dk, c.type_v, c.dv, true)),
        ctx(ggml_init({ size_t(256) << 20, nullptr, false }), ggml_free) {
        make_lists();
        make_codes();
        make_tensors();
    }

    Case                                                    c;
    std::mt19937                                            random;
    ggml_ext_kv_block                                       block;
    std::unique_ptr<ggml_context, void (*)(ggml_context *)> ctx;

    int                                         n_positions = 0, n_blocks = 0, n_code_blocks = 0;
    Codes                                       codes;
    std::vector<std::vector<ggml_ext_kv_entry>> runs;     // [lane][list]
    std::vector<std::vector<Slot>>              held;     // the same, in their order
    std::vector<std::vector<int>>               cells;    // [lane][position]
    std::vector<int>                            lane_of;  // of each token
    ggml_tensor *q = nullptr, *pool = nullptr, *table = nullptr, *cell_of = nullptr, *order = nullptr, *mask = nullptr,
                *sinks = nullptr;

    int n_lists() const { return c.n_layer * c.n_head_kv; }

    int n_tokens() const { return c.n_query * c.n_stream; }

    int n_head() const { return c.n_head_kv * c.gqa; }

    int below(int n) { return int(random() % unsigned(n)); }

    std::vector<float> normal(int n) {
        std::normal_distribution<float> dist;
        std::vector<float>              x(n);
        std::generate(x.begin(), x.end(), [&] { return dist(random); });
        return x;
    }

    void make_lists() {
        // Sequences of a unified cache have cells of their own, streams the same ones.
        std::vector<int> free(c.n_cells);
        std::iota(free.begin(), free.end(), 0);
        std::shuffle(free.begin(), free.end(), random);
        for (int lane = 0; lane < c.n_lane; ++lane) {
            const int n = c.whole ? c.n_cells - 70 * lane : 1 + below(c.n_cells / c.n_lane);
            n_positions = std::max(n_positions, n);
            cells.emplace_back(n);
            for (int p = 0; p < n; ++p) {
                cells[lane][p] = c.whole ? p : free[lane * (c.n_cells / c.n_lane) + p];
            }
            if (!c.whole && lane == 0) {
                std::sort(cells[0].begin(), cells[0].end());  // some tiles are adjacent columns
            }
            for (int list = 0; list < n_lists(); ++list) {
                if (c.shared && lane == 1) {
                    runs.push_back(runs[list]);
                    held.push_back(held[list]);
                } else {
                    add_list(n);
                }
            }
            if (c.shared && lane == 1) {
                cells[1] = cells[0];
            }
        }
    }

    void add_list(int n) {
        std::vector<ggml_ext_kv_entry> list;
        std::vector<Slot>              slots;
        for (int p = 0; p < n;) {
            const int  begin = c.whole ? 0 : below(SLOTS), room = SLOTS - begin;
            const int  count = c.whole ? std::min(SLOTS, n - p) : std::min(1 + below(room), n - p);
            const bool code  = c.codes.channels > 0 && below(2) == 0;
            const int  block = code ? n_code_blocks++ : n_blocks++;
            list.push_back({ code ? -1 - block : block, uint16_t(begin), uint16_t(count) });
            for (int i = 0; i < count; ++i) {
                slots.push_back({ block * SLOTS + begin + i, p++, {}, {}, code });
            }
            p += c.whole ? 0 : below(3) * below(20);  // evicted
        }
        runs.push_back(list);
        held.push_back(slots);
    }

    ggml_tensor * integers(int64_t ne0, int64_t ne1) { return ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, ne0, ne1); }

    void make_tensors() {
        pool = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I8, int64_t(block.size), std::max(1, n_blocks));
        std::memset(pool->data, 0xff, ggml_nbytes(pool));  // what no list holds is never looked at
        store_rows();
        make_table();
        q = ggml_new_tensor_4d(ctx.get(), GGML_TYPE_F32, c.dk, n_head(), c.n_query, c.n_stream);
        const std::vector<float> values = normal(int(ggml_nelements(q)));
        std::memcpy(q->data, values.data(), ggml_nbytes(q));
        q = ggml_permute(ctx.get(), q, 0, 2, 1, 3);
        mask =
            ggml_new_tensor_4d(ctx.get(), GGML_TYPE_F16, c.n_cells, c.n_query, c.mask_heads ? n_head() : 1, c.n_stream);
        for (int64_t i = 0; i < ggml_nelements(mask); ++i) {
            const float x = below(4) == 0 ? -INFINITY : below(2) == 0 ? 0.0f : -0.25f * float(below(9));
            ((ggml_fp16_t *) mask->data)[i] = ggml_fp32_to_fp16(x);
        }
        if (c.sinks) {
            sinks                      = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, n_head());
            const std::vector<float> s = normal(n_head());
            std::memcpy(sinks->data, s.data(), ggml_nbytes(sinks));
        }
    }

    void make_codes() {
        if (c.codes.channels == 0) {
            return;
        }
        codes = Codes(c.codes, c.dk, c.dv, c.n_head_kv, ctx.get(), random, std::max(1, n_code_blocks));
        for (size_t list = 0; list < held.size(); ++list) {
            for (Slot & slot : held[list]) {
                if (slot.code) {
                    const int head             = int(list) % c.n_head_kv;
                    *codes.position(slot.slot) = slot.position;
                    slot.k                     = codes.decoded(head, false, slot.slot);
                    slot.v                     = codes.decoded(head, true, slot.slot);
                }
            }
        }
        for (std::vector<ggml_ext_kv_entry> & list : runs) {
            for (ggml_ext_kv_entry & entry : list) {
                entry.block = entry.block < 0 ? n_blocks - 1 - entry.block : entry.block;
            }
        }
    }

    // A list at a time.
    void store_rows() {
        for (std::vector<Slot> & all : held) {
            std::vector<Slot> list;
            std::copy_if(all.begin(), all.end(), std::back_inserter(list),
                         [](const Slot & slot) { return !slot.code; });
            if (!list.empty()) {
                store_list(list);
            }
            auto next = list.begin();
            for (Slot & slot : all) {
                slot = slot.code ? slot : *next++;
            }
        }
    }

    void store_list(std::vector<Slot> & list) {
        const int64_t n     = int64_t(list.size());
        ggml_tensor * k     = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, c.dk, 1, n);
        ggml_tensor * v     = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, c.dv, 1, n);
        ggml_tensor * slots = integers(1, n);
        for (int64_t i = 0; i < n; ++i) {
            const Slot & slot                               = list[i];
            ((int32_t *) slots->data)[i]                    = slot.slot;
            ((int32_t *) block_of(slot))[slot.slot % SLOTS] = slot.position;
        }
        const std::vector<float> all_k = normal(int(n) * c.dk), all_v = normal(int(n) * c.dv);
        std::memcpy(k->data, all_k.data(), ggml_nbytes(k));
        std::memcpy(v->data, all_v.data(), ggml_nbytes(v));
        ggml_tensor *            keys     = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, c.dk, 1, n);
        const std::vector<float> all_keys = normal(int(n) * c.dk);
        std::memcpy(keys->data, all_keys.data(), ggml_nbytes(keys));
        ggml_tensor * stored =
            ggml_ext_kv_store(ctx.get(), pool, k, slots, nullptr, keys, c.type_k, int(block.k), int(block.score));
        run(ggml_ext_kv_store(ctx.get(), stored, v, slots, nullptr, nullptr, c.type_v, int(block.v), 0), 2);

        std::vector<float> stored_k, stored_v;
        for (Slot & slot : list) {
            const float * key = all_keys.data() + (&slot - list.data()) * c.dk;
            const double  sum = std::inner_product(key, key + c.dk, key, 0.0);
            const float   got = ((const float *) (block_of(slot) + block.score))[slot.slot % SLOTS];
            CHECK(std::fabs(got + sum) <= 1e-5 * sum, "score %g, sum of squares %g", got, sum);
            slot.k = decoded(c.type_k, block_of(slot) + block.k, slot.slot % SLOTS, c.dk);
            slot.v = decoded(c.type_v, block_of(slot) + block.v, slot.slot % SLOTS, c.dv);
            stored_k.insert(stored_k.end(), slot.k.begin(), slot.k.end());
            stored_v.insert(stored_v.end(), slot.v.begin(), slot.v.end());
        }
        CHECK(error(stored_k, all_k) < 0.1 && error(stored_v, all_v) < 0.1, "rows of %s and %s are not what was stored",
              ggml_type_name(c.type_k), ggml_type_name(c.type_v));
    }

    char * block_of(const Slot & slot) const { return (char *) pool->data + slot.slot / SLOTS * pool->nb[1]; }

    static std::vector<float> decoded(ggml_type type, const char * rows, int i, int d) {
        std::vector<float> row(d);
        ggml_get_type_traits(type)->to_float(rows + i * ggml_row_size(type, d), row.data(), d);
        return row;
    }

    void make_table() {
        std::vector<int32_t> offsets = { 0 }, entries;
        for (const auto & list : runs) {
            for (const ggml_ext_kv_entry & entry : list) {
                int32_t words[2];
                std::memcpy(words, &entry, sizeof(words));
                entries.insert(entries.end(), words, words + 2);
            }
            offsets.push_back(int32_t(entries.size() / 2));
        }
        offsets.insert(offsets.end(), entries.begin(), entries.end());
        table = integers(int64_t(offsets.size()) + 6, 1);  // longer than needed
        std::memset(table->data, 0xff, ggml_nbytes(table));
        std::memcpy(table->data, offsets.data(), offsets.size() * sizeof(int32_t));

        cell_of = integers(n_positions, c.n_lane);
        std::fill_n((int32_t *) cell_of->data, ggml_nelements(cell_of), -1);
        for (int lane = 0; lane < c.n_lane; ++lane) {
            std::copy(cells[lane].begin(), cells[lane].end(), (int32_t *) cell_of->data + lane * n_positions);
        }
        for (int t = 0; t < n_tokens(); ++t) {
            lane_of.push_back(c.n_stream > 1 ? t / c.n_query : below(c.n_lane));
        }
        order          = integers(c.n_lane + 1 + n_tokens(), 1);
        int32_t * to   = (int32_t *) order->data;
        int32_t   done = 0;
        for (int lane = 0; lane < c.n_lane; ++lane) {
            to[lane] = done;
            for (int t = 0; t < n_tokens(); ++t) {
                if (lane_of[t] == lane) {
                    to[c.n_lane + 1 + done++] = t;
                }
            }
        }
        to[c.n_lane] = done;
    }

    static void run(ggml_tensor * result, int n_threads) {
        ggml_init_params params = { 1 << 20, nullptr, true };
        ggml_context *   graphs = ggml_init(params);
        ggml_cgraph *    graph  = ggml_new_graph(graphs);
        ggml_build_forward_expand(graph, result);
        ggml_cplan           plan = ggml_graph_plan(graph, n_threads, nullptr);
        std::vector<uint8_t> work(plan.work_size, 0xff);
        plan.work_data = work.data();
        CHECK(ggml_graph_compute(graph, &plan) == GGML_STATUS_SUCCESS, "compute");
        ggml_free(graphs);
    }

    ggml_ext_kv_attend_params params(int layer) const {
        ggml_ext_kv_attend_params p = {};
        p.type_k = c.type_k, p.type_v = c.type_v, p.dk = c.dk, p.dv = c.dv, p.n_head_kv = c.n_head_kv;
        p.first_list = layer * c.n_head_kv, p.n_lists = n_lists();
        p.scale = 1.0f / std::sqrt(float(c.dk)), p.max_bias = c.max_bias, p.cap = c.cap;
        p.n_keys = c.n_keys;
        return p;
    }

    // [token][head][dv]
    std::vector<float> attend(int layer, int n_threads) {
        const ggml_ext_kv_attend_params p = params(layer);
        ggml_tensor * out = ggml_ext_kv_attend(ctx.get(), q, pool, table, cell_of, order, mask, sinks, &p,
                                               c.codes.channels ? &codes.tensors : nullptr);
        std::memset(out->data, 0xff, ggml_nbytes(out));
        run(out, n_threads);
        return { (const float *) out->data, (const float *) out->data + ggml_nelements(out) };
    }

    double slope(int head) const {
        const int power = 1 << int(std::floor(std::log2(n_head())));
        return c.max_bias <= 0 ? 1 :
               head < power    ? std::pow(2.0, -c.max_bias / power * (head + 1)) :
                                 std::pow(2.0, -c.max_bias / 2 / power * (2 * (head - power) + 1));
    }

    // With a bug, for what the tolerance is worth: "cell": columns of the mask by position; "lane": another lane's list;
    // "layer": another layer's; "last": a run's last slot forgotten.
    std::vector<float> reference(int layer, const std::string & bug = "") const {
        std::vector<float> out;
        for (int t = 0; t < n_tokens(); ++t) {
            for (int h = 0; h < n_head(); ++h) {
                const int lane = bug == "lane" ? (lane_of[t] + 1) % c.n_lane : lane_of[t];
                const int list = lane * n_lists() + (bug == "layer" ? 1 - layer : layer) * c.n_head_kv + h / c.gqa;
                row(t, h, lane, list, bug, out);
            }
        }
        return out;
    }

    float & score_of(const Slot & slot) const { return ((float *) (block_of(slot) + block.score))[slot.slot % SLOTS]; }

    // Probabilities of the slots of a list for head h of token t; none where nothing is visible.
    std::vector<double> probabilities(int t, int h, int lane, int list, const std::string & bug) const {
        const int           i1 = t % c.n_query, i3 = t / c.n_query;
        const float *       x = (const float *) ((const char *) q->data + i1 * q->nb[1] + h * q->nb[2] + i3 * q->nb[3]);
        const auto *        m = (const ggml_fp16_t *) ((const char *) mask->data + i1 * mask->nb[1] +
                                                h % mask->ne[2] * mask->nb[2] + i3 * mask->nb[3]);
        std::vector<double> logits;
        double              max = sinks ? ((const float *) sinks->data)[h] : -INFINITY;
        for (const Slot & slot : held[list]) {
            double s = 0;
            for (int d = 0; d < c.dk; ++d) {
                s += double(x[d]) * slot.k[d];
            }
            s /= std::sqrt(double(c.dk));
            s              = c.cap != 0 ? c.cap * std::tanh(s / c.cap) : s;
            const int cell = bug == "cell" ? slot.position : cells[lane][slot.position];
            s += slope(h) * ggml_fp16_to_fp32(m[cell]);
            logits.push_back(bug == "last" && slot.slot % 8 == 0 ? -INFINITY : s);
            max = std::fmax(max, logits.back());
        }
        double total = sinks ? std::exp(((const float *) sinks->data)[h] - max) : 0;
        for (double & x : logits) {
            x = max > -INFINITY ? std::exp(x - max) : 0;
            total += x;
        }
        for (double & x : logits) {
            x = total > 0 ? x / total : 0;
        }
        return logits;
    }

    void row(int t, int h, int lane, int list, const std::string & bug, std::vector<float> & out) const {
        const std::vector<double> p = probabilities(t, h, lane, list, bug);
        std::vector<double>       sum(c.dv);
        for (size_t j = 0; j < p.size(); ++j) {
            for (int d = 0; d < c.dv; ++d) {
                sum[d] += p[j] * held[list][j].v[d];
            }
        }
        out.insert(out.end(), sum.begin(), sum.end());
    }
};

}  // namespace kv
