// kv_score on the CPU against squares of probabilities in double, over random lists of runs, with 1 to 4 threads.
//
// What would break it: another window of queries, heads of another group, probabilities of a chunk for those of the list, a
// tile's tokens in another order, recent slots scored, a lane of few queries scored, a slot of two lanes scored once.

#include "check.h"
#include "ggml-ext.h"
#include "kv_attend_problem.h"

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

using namespace kv;

namespace {

struct Rule {
    int   window = 8, recent = 20;
    float decay = 0.75f;
};

std::vector<float *> all_scores(Problem & problem) {
    std::vector<float *> all;
    for (const auto & list : problem.held) {
        for (const Slot & slot : list) {
            all.push_back(&problem.score_of(slot));
        }
    }
    return all;
}

std::vector<float> values(const std::vector<float *> & scores) {
    std::vector<float> all;
    for (const float * score : scores) {
        all.push_back(*score);
    }
    return all;
}

void set(const std::vector<float *> & scores, const std::vector<float> & to) {
    for (size_t i = 0; i < to.size(); ++i) {
        *scores[i] = to[i];
    }
}

// The pool's scores afterwards, in the order of all_scores.
std::vector<float> score(Problem & problem, const Rule & rule, int layer, int n_threads) {
    ggml_ext_kv_score_params p = {};
    p.attend                   = problem.params(layer);
    p.window                   = rule.window;
    p.recent                   = rule.recent;
    p.decay                    = rule.decay;
    p.score                    = int(problem.block.score);
    Problem::run(ggml_ext_kv_score(problem.ctx.get(), problem.q, problem.pool, problem.table, problem.cell_of,
                                   problem.order, problem.mask, problem.sinks, &p),
                 n_threads);
    return values(all_scores(problem));
}

// What the pool's scores become, into the pool. bug: "window": the first queries; "group": another KV head's; "recent": the
// end is scored; "few": any lane; "sum": not a mean; "last": the score that was there is forgotten.
void reference(Problem & problem, const Rule & rule, int layer, const std::string & bug = "") {
    const Case & c = problem.c;
    for (int lane = 0; lane < c.n_lane; ++lane) {
        std::vector<int> tokens;
        for (int t = 0; t < problem.n_tokens(); ++t) {
            if (problem.lane_of[t] == lane) {
                tokens.push_back(t);
            }
        }
        if (tokens.empty() || (int(tokens.size()) * 4 < rule.window && bug != "few")) {
            continue;
        }
        const int n = std::min(rule.window, int(tokens.size()));
        tokens      = bug == "window" ? std::vector<int>(tokens.begin(), tokens.begin() + n) :
                                        std::vector<int>(tokens.end() - n, tokens.end());
        for (int head = 0; head < c.n_head_kv; ++head) {
            const int                 list = lane * problem.n_lists() + layer * c.n_head_kv + head;
            const std::vector<Slot> & held = problem.held[list];
            std::vector<double>       seen(held.size());
            for (int t : tokens) {
                for (int g = 0; g < c.gqa; ++g) {
                    const int  from = bug == "group" ? (head + 1) % c.n_head_kv : head;
                    const auto p    = problem.probabilities(t, from * c.gqa + g, lane, list, "");
                    for (size_t j = 0; j < held.size(); ++j) {
                        seen[j] += p[j] * p[j] / (bug == "sum" ? 1 : n);
                    }
                }
            }
            for (size_t j = 0; j < held.size(); ++j) {
                float & to = problem.score_of(held[j]);
                if (held[j].position <= held.back().position - rule.recent || bug == "recent") {
                    to = float(std::isinf(to) || bug == "last" ? seen[j] : std::max(double(rule.decay) * to, seen[j]));
                }
            }
        }
    }
}

// Sizes of scores differ by orders of magnitude; none counts for less because another is large.
double worst(const std::vector<float> & a, const std::vector<float> & b) {
    double worst = 0;
    for (size_t i = 0; i < b.size(); ++i) {
        if (std::isinf(a[i]) && std::isinf(b[i])) {
            continue;
        }
        const double off = std::fabs(double(a[i]) - b[i]) / (std::fabs(double(b[i])) + 1e-7);
        worst            = std::isnan(off) ? INFINITY : std::max(worst, off);
    }
    return worst;
}

double check(const Case & c, const Rule & rule, unsigned seed, const char * name, const std::string & bug = "") {
    Problem                    problem(c, seed);
    const std::vector<float *> scores = all_scores(problem);
    std::vector<float>         before;
    for (size_t i = 0; i < scores.size(); ++i) {
        before.push_back(problem.below(3) == 0 ? INFINITY : 2e-3f * float(problem.below(8)));
    }
    // Where two lists hold a slot, it has one score.
    set(scores, before);
    before                       = values(scores);
    const std::vector<float> one = score(problem, rule, 1, 1);
    for (int n_threads : { 2, 4 }) {
        set(scores, before);
        const std::vector<float> other = score(problem, rule, 1, n_threads);
        CHECK(std::memcmp(one.data(), other.data(), one.size() * sizeof(float)) == 0, "%s: %d threads", name,
              n_threads);
    }
    set(scores, before);
    reference(problem, rule, 1, bug);
    const double off = worst(one, values(scores));
    if (bug.empty()) {
        // Queries are rounded to 8 bits, which moves logits by some hundredths, and squares by twice that.
        CHECK(off < 0.1, "%s: off by %.4f", name, off);
        CHECK(one != before || c.n_lane > 1, "%s: nothing was scored", name);
    }
    return off;
}

void test_against_double() {
    Case plain;
    plain.n_query = 30;
    check(plain, {}, 1, "plain");
    for (ggml_type type : { GGML_TYPE_Q4_0, GGML_TYPE_Q5_0, GGML_TYPE_IQ4_NL, GGML_TYPE_F16 }) {
        Case c   = plain;
        c.type_k = type;
        check(c, {}, 2, ggml_type_name(type));
    }
    Case c     = plain;
    c.max_bias = 8;
    check(c, {}, 4, "slopes");
    c.cap = 5;
    check(c, {}, 5, "cap");
    c       = plain;
    c.sinks = c.mask_heads = true;
    check(c, {}, 6, "sinks and a mask per head");
    c.dk = 128, c.dv = 32, c.gqa = 1, c.n_head_kv = 3;
    check(c, {}, 7, "heads of 128 and 32");
    c        = plain;
    c.shared = true;
    check(c, {}, 8, "shared slots");
    c          = plain;
    c.n_stream = 3, c.n_query = 12;
    check(c, {}, 9, "streams");
    c         = plain;
    c.n_cells = 8192, c.n_lane = 1;
    check(c, { 32, 64, 0.9f }, 10, "many chunks");
    c         = plain;
    c.n_query = 3, c.n_lane = 1;
    check(c, { 12, 1, 0 }, 11, "a quarter of the window");
    for (unsigned seed = 20; seed < 40; ++seed) {
        c           = plain;
        c.n_cells   = 256 << seed % 3;
        c.n_lane    = 1 + int(seed % 4);
        c.n_query   = 8 + int(seed * 7 % 60);
        c.gqa       = 1 + int(seed % 4);
        c.n_head_kv = 1 + int(seed % 3);
        check(c, { 1 + int(seed % 24), 1 + int(seed % 50), 0.1f * float(seed % 11) }, seed, "random");
    }
}

void test_bugs_are_seen() {
    Case c;
    c.n_query = 60, c.n_cells = 2048;
    for (const char * bug : { "window", "group", "recent", "sum", "last" }) {
        CHECK(check(c, {}, 1, bug, bug) > 0.5, "a reference with the bug '%s' is as near", bug);
    }
    CHECK(check(c, { 120, 20, 0.75f }, 1, "few", "few") > 0.5, "a reference that scores by %s is as near",
          "a few queries");
}

// A query or a key that is not finite counts for nothing; other heads' scores are as without it.
void test_not_finite() {
    Case c;
    c.n_query = 30, c.n_lane = 1, c.n_layer = 1, c.gqa = 1;
    Problem                    problem(c, 3);
    const std::vector<float *> scores = all_scores(problem);
    std::vector<float>         start(scores.size(), INFINITY);
    const Rule                 rule;
    set(scores, start);
    const std::vector<float> clean = score(problem, rule, 0, 1);
    // The last query of head 0, and all of head 1's window.
    float *                  q     = (float *) problem.q->data;
    for (int t = 0; t < c.n_query; ++t) {
        for (int h = 0; h < 2; ++h) {
            if (h == 1 || t == c.n_query - 1) {
                *(float *) ((char *) q + t * problem.q->nb[1] + h * problem.q->nb[2]) = NAN;
            }
        }
    }
    set(scores, start);
    const std::vector<float> got  = score(problem, rule, 0, 1);
    const size_t             n    = problem.held[0].size();
    bool                     some = false;
    for (size_t i = 0; i < got.size(); ++i) {
        CHECK(!std::isnan(got[i]), "slot %zu", i);
        if (i < n) {
            CHECK(got[i] <= clean[i], "slot %zu of the head with one query less: %g, before %g", i, got[i], clean[i]);
            some |= got[i] > 0 && !std::isinf(got[i]);
        } else {
            CHECK(std::isinf(got[i]) || got[i] == 0, "slot %zu of the head without queries: %g", i, got[i]);
        }
    }
    CHECK(some, "%s", "seven queries are left");
}

}  // namespace

int main() {
    test_against_double();
    test_bugs_are_seen();
    test_not_finite();
    return check_done();
}
