// GGML_EXT_OP_SAMPLE on the CPU: the reference. The end of a prefix is found by halving the candidates around a
// median until one is left; CUDA finds it by histograms.

#include "core/cpu/ext_op.h"
#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#include "sample/sample_math.h"

#include <algorithm>

namespace {

struct candidate {
    uint64_t place;
    uint64_t mass;  // at temperature 1
};

struct prefix_end {
    uint64_t place;  // of its last candidate
    uint64_t mass;   // of the whole prefix
};

bool before(const candidate & a, const candidate & b) {
    return a.place > b.place;
}

// The shortest prefix of at least so many candidates or so much mass.
enum class measure { count, mass };

prefix_end find_end(candidate * from, candidate * to, measure what, uint64_t target) {
    uint64_t reached = 0, mass = 0;
    while (to - from > 1) {
        candidate * const middle = from + (to - from) / 2;
        std::nth_element(from, middle, to, before);
        uint64_t half = 0;
        for (const candidate * c = from; c < middle; c++) {
            half += c->mass;
        }
        const uint64_t step = what == measure::count ? uint64_t(middle - from) : half;
        if (reached + step >= target) {
            to = middle;
        } else {
            reached += step;
            mass += half;
            from = middle;
        }
    }
    return { from->place, mass + from->mass };
}

// Place of the last kept candidate.
uint64_t find_cut(candidate * list, int64_t n, uint64_t best, const ggml_ext_sample_params & p) {
    const auto end_at = [&](measure what, uint64_t target) { return find_end(list, list + n, what, target); };
    uint64_t   cut    = 0;
    uint64_t   total  = 0;
    if (p.top_k > 0 && p.top_k < n) {
        const prefix_end end = end_at(measure::count, uint64_t(p.top_k));
        cut                  = end.place;
        total                = end.mass;
    } else {
        std::for_each(list, list + n, [&](const candidate & c) { total += c.mass; });
    }
    uint64_t least = UINT64_MAX;  // top-p and min-p keep what is not behind it
    if (p.min_keep > 1) {
        least = p.min_keep < n ? end_at(measure::count, uint64_t(p.min_keep)).place : 0;
    }
    if (p.top_p < 1) {
        cut = std::max(cut, std::min(least, end_at(measure::mass, ggml_ext_sample_share(p.top_p, total)).place));
    }
    if (p.log_min_p > -INFINITY) {
        cut = std::max(cut, std::min(least, ggml_ext_sample_min_p(best, p.log_min_p)));
    }
    return cut;
}

int32_t sample(const float * logits, int64_t n_vocab, const ggml_ext_sample_params & p, candidate * list) {
    uint64_t best = 0;
    int64_t  n    = 0;
    for (int64_t i = 0; i < n_vocab; i++) {
        const uint32_t key = ggml_ext_sample_key(logits[i]);
        if (ggml_ext_sample_wrong(key)) {
            return -1;
        }
        if (key > ggml_ext_sample_key_nothing) {
            list[n++] = { ggml_ext_sample_place(key, uint32_t(i)), 0 };
            best      = std::max(best, list[n - 1].place);
        }
    }
    const float inverse = ggml_ext_sample_inverse(p.temperature);
    if (n == 0 || inverse == 0) {
        return n ? ggml_ext_sample_id(best) : -1;
    }
    const float max = ggml_ext_sample_logit(uint32_t(best >> 32));
    for (int64_t i = 0; i < n; i++) {
        list[i].mass = ggml_ext_sample_mass(ggml_ext_sample_logit(uint32_t(list[i].place >> 32)) - max);
    }
    const uint64_t cut   = find_cut(list, n, best, p);
    const auto     drawn = [&](int64_t i) -> uint64_t {
        const uint64_t place = ggml_ext_sample_place(ggml_ext_sample_key(logits[i]), uint32_t(i));
        return place < cut ? 0 : ggml_ext_sample_mass((logits[i] - max) * inverse);
    };
    uint64_t total = 0;
    for (int64_t i = 0; i < n_vocab; i++) {
        total += drawn(i);
    }
    uint64_t left = ggml_ext_sample_scaled(p.uniform, total);
    int64_t  id   = 0;
    for (uint64_t mass; (mass = drawn(id)) <= left; id++) {
        left -= mass;
    }
    return int32_t(id);
}

void compute(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * logits = dst->src[0];
    const ggml_tensor * ids    = dst->src[2];
    candidate *         list   = (candidate *) params->wdata + params->ith * logits->ne[0];
    for (int64_t row = params->ith; row < logits->ne[1]; row += params->nth) {
        ggml_ext_sample_params p;
        memcpy(&p, (const char *) dst->src[1]->data + row * dst->src[1]->nb[1], sizeof(p));
        const float *   from         = (const float *) ((const char *) logits->data + row * logits->nb[1]);
        const int32_t   place        = sample(from, logits->ne[0], p, list);
        const int32_t * names        = ids ? (const int32_t *) ((const char *) ids->data + row * ids->nb[1]) : nullptr;
        ((int32_t *) dst->data)[row] = names && place >= 0 ? names[place] : place;
    }
}

int n_tasks(const ggml_tensor * dst, int n_threads) {
    return int(std::max<int64_t>(1, std::min<int64_t>(n_threads, dst->ne[0])));
}

size_t work_size(const ggml_tensor * dst, int n_tasks) {
    return size_t(n_tasks) * size_t(dst->src[0]->ne[0]) * sizeof(candidate);
}

}  // namespace

extern "C" const ggml_ext_cpu_op ggml_ext_cpu_sample = { compute, n_tasks, work_size };
