// softmax(q k^T) v in double, as it should be, with the rounding of a mode, or with a known bug.

#pragma once

#include "attention_problem.h"

namespace attention {

// Bugs that attention kernels have had; the reference with one of them must be farther off than the tolerance.
enum Bug {
    CORRECT,
    CAUSAL_TOP_LEFT,  // row i sees positions 0..i although the chunk starts at n_kv - n_q
    WRONG_HEAD,       // query head h reads K/V head h % heads_kv
    SOFTCAP_MISSING,
    SINK_MISSING,
    SLOPE_MISSING,      // ALiBi with slope 1 for every head
    MASK_MISSING,
    TAIL_MISSING,       // positions behind the last multiple of 32 are dropped
    RESULT_TRANSPOSED,  // heads and rows of the result swapped
    BATCH_IGNORED,      // every batch entry reads the first one's K and V
    FLAT_TAIL_LOST,     // weights are rounded against the row's maximum, not against their own tile's
};

// Rounding that a mode is stated to do, applied in the reference: the error it causes there is the mode's budget.
// Values of a group become step * rint(x / step) with step = max|x| / levels; 0 levels: no rounding.
struct Rounding {
    int     q_levels = 0;
    int64_t q_group  = 0;      // channels; 0: the whole row
    int     k_levels = 0;      // per row
    bool    k_smooth = false;  // the mean over each tile is taken off K before rounding
    int     v_levels = 0;      // per row
    // A weight is rounded together with the step of the V values it multiplies: in a group of v_group channels (0: all)
    // whose largest value is a, p a is a multiple of (largest p of the tile) (largest a of the tile) / p_levels.
    int     p_levels = 0;
    int64_t v_group  = 0;
    int64_t tile     = 64;  // positions
};

inline float abs_max(const float * x, int64_t n) {
    float max = 0.0f;
    for (int64_t i = 0; i < n; i++) {
        max = std::fmax(max, std::fabs(x[i]));
    }
    return max;
}

inline void round_rows(std::vector<float> & x, int64_t width, int levels, int64_t group) {
    group = group ? group : width;
    for (size_t i = 0; levels && i < x.size(); i += group) {
        const float step = abs_max(x.data() + i, group) / (float) levels;
        for (int64_t j = 0; step > 0 && j < group; j++) {
            x[i + j] = step * std::rint(x[i + j] / step);
        }
    }
}

// Values of a tensor with contiguous rows, [ne3][ne2][ne1][ne0].
inline std::vector<float> decode(const ggml_tensor * t) {
    std::vector<float> values(ggml_nelements(t));
    float *            to       = values.data();
    const auto         to_float = ggml_get_type_traits(t->type)->to_float;
    for (int64_t i3 = 0; i3 < t->ne[3]; i3++) {
        for (int64_t i2 = 0; i2 < t->ne[2]; i2++) {
            for (int64_t i1 = 0; i1 < t->ne[1]; i1++, to += t->ne[0]) {
                const char * from = (const char *) t->data + i1 * t->nb[1] + i2 * t->nb[2] + i3 * t->nb[3];
                if (t->type == GGML_TYPE_F32) {
                    std::memcpy(to, from, t->ne[0] * sizeof(float));
                } else {
                    to_float(from, to, t->ne[0]);
                }
            }
        }
    }
    return values;
}

inline double slope(const Case & c, int64_t head) {
    const int64_t heads = c.heads_kv * c.gqa;
    const int64_t power = int64_t(1) << (int64_t) std::floor(std::log2((double) heads));
    return c.max_bias <= 0 ? 1.0 :
           head < power    ? std::pow(2.0, -c.max_bias / (double) power * (double) (head + 1)) :
                             std::pow(2.0, -c.max_bias / 2 / (double) power * (double) (2 * (head - power) + 1));
}

class Reference {
  public:
    Reference(const Problem & problem, const Rounding & r, Bug bug) :
        problem(problem), c(problem.c), r(r), bug(bug), heads(c.heads_kv * c.gqa), exact_q(decode(problem.q)),
        q(exact_q), k(decode(problem.k)), v(decode(problem.v)) {
        if (r.k_smooth) {
            smooth();
        }
        round_rows(q, c.dk, r.q_levels, r.q_group);
        round_rows(k, c.dk, r.k_levels, 0);
        round_rows(v, c.dv, r.v_levels, 0);
    }

    // [batch][n_q][heads][dv], like the op's result.
    std::vector<double> result() const {
        std::vector<double> out(c.batch * c.n_q * heads * c.dv), p(c.n_kv);
        for (int64_t b = 0; b < c.batch; b++) {
            for (int64_t h = 0; h < heads; h++) {
                for (int64_t i = 0; i < c.n_q; i++) {
                    const int64_t row =
                        bug == RESULT_TRANSPOSED ? (b * heads + h) * c.n_q + i : (b * c.n_q + i) * heads + h;
                    if (weights(b, h, i, p)) {
                        add_values(kv_head(b, h), p, out.data() + row * c.dv);
                    }
                }
            }
        }
        return out;
    }

  private:
    int64_t kv_head(int64_t b, int64_t h) const {
        return (bug == BATCH_IGNORED ? 0 : b) * c.heads_kv + (bug == WRONG_HEAD ? h % c.heads_kv : h / c.gqa);
    }

    // Takes the mean over each tile of positions off K. The logits get q . mean back, q unrounded.
    void smooth() {
        means.resize(k.size());
        for (int64_t row = 0; row < c.batch * c.heads_kv * c.n_kv; row++) {
            const int64_t position = row % c.n_kv, first = row - position % r.tile;
            const int64_t n = std::min(r.tile, c.n_kv - (first % c.n_kv));
            for (int64_t d = 0; position % r.tile == 0 && d < c.dk; d++) {
                double sum = 0;
                for (int64_t j = 0; j < n; j++) {
                    sum += k[(row + j) * c.dk + d];
                }
                for (int64_t j = 0; j < n; j++) {
                    means[(row + j) * c.dk + d] = (float) (sum / (double) n);
                    k[(row + j) * c.dk + d] -= (float) (sum / (double) n);
                }
            }
        }
    }

    double mask(int64_t b, int64_t h, int64_t i, int64_t j) const {
        if (!problem.mask || bug == MASK_MISSING) {
            return 0;
        }
        if (bug == CAUSAL_TOP_LEFT) {
            return j > i ? -INFINITY : 0;
        }
        const ggml_tensor * t   = problem.mask;
        const char *        row = (const char *) t->data + i * t->nb[1] + h % t->ne[2] * t->nb[2] + b * t->nb[3];
        return ggml_fp16_to_fp32(((const ggml_fp16_t *) row)[j]);
    }

    double logit(int64_t b, int64_t h, int64_t i, int64_t j) const {
        const int64_t at_q = ((b * heads + h) * c.n_q + i) * c.dk, at_k = (kv_head(b, h) * c.n_kv + j) * c.dk;
        double        s = 0;
        for (int64_t d = 0; d < c.dk; d++) {
            s += (double) q[at_q + d] * k[at_k + d];
        }
        for (int64_t d = 0; r.k_smooth && d < c.dk; d++) {
            s += (double) exact_q[at_q + d] * means[at_k + d];
        }
        s *= problem.scale();
        return c.softcap != 0 && bug != SOFTCAP_MISSING ? c.softcap * std::tanh(s / c.softcap) : s;
    }

    // p: the softmax of one row; false if everything is masked.
    bool weights(int64_t b, int64_t h, int64_t i, std::vector<double> & p) const {
        const int64_t end  = bug == TAIL_MISSING ? c.n_kv / 32 * 32 : c.n_kv;
        const double  m    = bug == SLOPE_MISSING ? 1.0 : slope(c, h);
        const double  sink = c.sinks && bug != SINK_MISSING ? ((const float *) problem.sinks->data)[h] : -INFINITY;
        double        max = sink, total = 0;
        for (int64_t j = 0; j < c.n_kv; j++) {
            const double shift = mask(b, h, i, j);
            p[j]               = shift == -INFINITY || j >= end ? -INFINITY : logit(b, h, i, j) + m * shift;
            max                = std::fmax(max, p[j]);
        }
        if (max == -INFINITY) {
            return false;
        }
        for (double & x : p) {
            x = std::exp(x - max);
            total += x;
        }
        total += std::exp(sink - max);
        for (double & x : p) {
            x /= total;
        }
        return true;
    }

    void add_values(int64_t head, const std::vector<double> & p, double * to) const {
        const int64_t       group = r.v_group && r.p_levels ? r.v_group : c.dv;
        const float *       vh    = v.data() + head * c.n_kv * c.dv;
        std::vector<double> rounded;
        for (int64_t first = 0; first < c.dv; first += group) {
            const int64_t n = std::min(group, c.dv - first);
            rounded         = p;
            if (r.p_levels) {
                round_weights(vh + first, n, rounded);
            }
            for (int64_t j = 0; j < c.n_kv; j++) {
                for (int64_t d = first; rounded[j] != 0 && d < first + n; d++) {
                    to[d] += rounded[j] * vh[j * c.dv + d];
                }
            }
        }
    }

    void round_weights(const float * vh, int64_t n, std::vector<double> & p) const {
        const int64_t tile = bug == FLAT_TAIL_LOST ? c.n_kv : r.tile;
        for (int64_t start = 0; start < c.n_kv; start += tile) {
            const int64_t end   = std::min(c.n_kv, start + tile);
            double        p_max = 0, a_max = 0;
            for (int64_t j = start; j < end; j++) {
                p_max = std::fmax(p_max, p[j]);
                a_max = std::fmax(a_max, (double) abs_max(vh + j * c.dv, n));
            }
            const double step = p_max * a_max / r.p_levels;
            for (int64_t j = start; step > 0 && j < end; j++) {
                const double a = abs_max(vh + j * c.dv, n);
                p[j]           = a > 0 ? step * std::rint(p[j] * a / step) / a : 0;
            }
        }
    }

    const Problem &    problem;
    const Case &       c;
    const Rounding     r;
    const Bug          bug;
    const int64_t      heads;
    std::vector<float> exact_q, q, k, v, means;  // means: one row per row of k
};

inline std::vector<double> reference(const Problem & problem, const Rounding & rounding = {}, Bug bug = CORRECT) {
    return Reference(problem, rounding, bug).result();
}

// Root of the squared distance over the squared size of b; anything not finite in a counts as infinite.
template <class T> double relative_error(const std::vector<T> & a, const std::vector<double> & b) {
    double distance = 0, size = 0;
    for (size_t i = 0; i < b.size(); i++) {
        if (!std::isfinite((double) a[i])) {
            return INFINITY;
        }
        distance += (a[i] - b[i]) * (a[i] - b[i]);
        size += b[i] * b[i];
    }
    return size > 0 ? std::sqrt(distance / size) : distance > 0 ? INFINITY : 0.0;
}

// A bug of the reference and a problem that shows it. The distance of a result from a broken reference has to be far
// beyond the tolerance, or the comparison with the correct one proves nothing about that bug.
struct Broken {
    Bug          bug;
    const char * name;
    Case         c;
};

// Over n_q queries; the first has the plain problem, which others share.
inline std::vector<Broken> broken_references(int64_t n_q) {
    const ggml_type type   = GGML_TYPE_Q8_0;
    const Case      plain  = { 64, 64, 100, n_q, 2, 4, type, type };
    Case            capped = plain, sunk = plain, biased = plain, two = plain;
    capped.softcap  = 2.0f;
    sunk.sinks      = true;
    biased.max_bias = 8.0f;
    two.batch       = 2;
    return {
        { CAUSAL_TOP_LEFT,   "causal mask aligned top left",   plain  },
        { WRONG_HEAD,        "wrong K/V head of a group",      plain  },
        { MASK_MISSING,      "mask forgotten",                 plain  },
        { TAIL_MISSING,      "ragged tail dropped",            plain  },
        { RESULT_TRANSPOSED, "result not permuted",            plain  },
        { SOFTCAP_MISSING,   "softcap forgotten",              capped },
        { SINK_MISSING,      "sinks forgotten",                sunk   },
        { SLOPE_MISSING,     "one ALiBi slope for all heads",  biased },
        { BATCH_IGNORED,     "first batch entry used for all", two    },
    };
}

}  // namespace attention
