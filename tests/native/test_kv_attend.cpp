// kv_store and kv_attend on the CPU. Rows go into a pool by the one and are attended by the other, over random lists of
// runs, one list per lane, layer and head, against softmax in double over the same rows; and, where lists are whole blocks
// in the order of the cells, against attention over an ordinary cache, bit by bit.

#include "check.h"
#include "ggml-ext.h"
#include "kv_attend_problem.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

using namespace kv;

namespace {

// Queries are rounded to 8 bits; f16 rows as well.
void check(const Case & c, unsigned seed, const char * name) {
    Problem      problem(c, seed);
    const double tolerance = c.type_k == GGML_TYPE_F16 ? 0.02 : 0.01;
    for (int layer = 0; layer < c.n_layer; ++layer) {
        const std::vector<float> one = problem.attend(layer, 1);
        CHECK(one == problem.attend(layer, 3), "%s: threads change the result", name);
        const double off = error(one, problem.reference(layer));
        CHECK(off < tolerance, "%s, layer %d: off by %.4f", name, layer, off);
    }
}

void test_against_double() {
    const Case plain;
    check(plain, 1, "plain");
    for (ggml_type type : { GGML_TYPE_Q4_0, GGML_TYPE_Q5_0, GGML_TYPE_IQ4_NL, GGML_TYPE_F16 }) {
        Case c   = plain;
        c.type_k = type;
        check(c, 2, ggml_type_name(type));
        std::swap(c.type_k, c.type_v);
        check(c, 3, ggml_type_name(type));
    }
    Case c     = plain;
    c.max_bias = 8;
    check(c, 4, "slopes");
    c.cap = 5;
    check(c, 5, "cap");
    c       = plain;
    c.sinks = c.mask_heads = true;
    check(c, 6, "sinks and a mask per head");
    c.dk = 128, c.dv = 32, c.gqa = 1, c.n_head_kv = 3;
    check(c, 7, "heads of 128 and 32");
    c         = plain;
    c.n_query = 70;  // several blocks of queries, no chunks
    check(c, 8, "many queries");
    c.n_query = 1, c.n_lane = 1;
    check(c, 9, "one query");
    c          = plain;
    c.n_stream = 3, c.n_query = 2;
    check(c, 10, "streams");
    c.n_cells = 4096, c.n_query = 1;
    check(c, 11, "chunks");
    for (unsigned seed = 20; seed < 40; ++seed) {
        c           = plain;
        c.n_cells   = 256 << seed % 3;
        c.n_lane    = 1 + int(seed % 5);
        c.n_query   = 1 + int(seed * 7 % 40);
        c.gqa       = 1 + int(seed % 4);
        c.n_head_kv = 1 + int(seed % 3);
        c.n_keys    = int(seed % 4) * 100;  // also fewer than lists hold
        check(c, seed, "random");
    }
}

void test_codes() {
    for (const int channels : { 4, 8 }) {
        Case c;
        c.codes.channels = channels;
        check(c, 50, "codes, nothing turned");
        c.codes.n_rot = c.dk;
        check(c, 51, "codes");
        c.codes.neox = true;
        check(c, 52, "codes, pairs half a head apart");
        c.codes.n_rot = 24, c.codes.length = 1.3f;
        check(c, 53, "codes, a part turned, lengthened");
        c.dk = 128, c.dv = 32, c.gqa = 1, c.n_head_kv = 3, c.codes.n_rot = 128;
        check(c, 54, "codes, heads of 128 and 32");
        c.n_query = 70, c.sinks = true, c.cap = 5;
        check(c, 55, "codes, many queries");
    }
}

void test_bugs_are_seen() {
    Problem                  problem(Case{}, 1);
    const std::vector<float> got = problem.attend(0, 1);
    for (const char * bug : { "cell", "lane", "layer", "last" }) {
        CHECK(error(got, problem.reference(0, bug)) > 0.1, "a reference with the bug '%s' is as near", bug);
    }
}

// The layout of an ordinary cache: heads inside, cells outside.
ggml_tensor * cache(Problem & problem, int layer, bool v) {
    const Case &    c    = problem.c;
    const ggml_type type = v ? c.type_v : c.type_k;
    const int       d    = v ? c.dv : c.dk;
    const size_t    row  = ggml_row_size(type, d);
    ggml_tensor *   t    = ggml_new_tensor_4d(problem.ctx.get(), type, d, c.n_head_kv, c.n_cells, c.n_stream);
    std::memset(t->data, 0, ggml_nbytes(t));
    for (int lane = 0; lane < c.n_stream; ++lane) {
        for (int head = 0; head < c.n_head_kv; ++head) {
            const int list = lane * problem.n_lists() + layer * c.n_head_kv + head;
            for (const Slot & slot : problem.held[list]) {
                const char * from = (const char *) problem.pool->data + slot.slot / SLOTS * problem.pool->nb[1] +
                                    (v ? problem.block.v : problem.block.k) + slot.slot % SLOTS * row;
                std::memcpy((char *) t->data + slot.position * t->nb[2] + head * t->nb[1] + lane * t->nb[3], from, row);
            }
        }
    }
    return ggml_permute(problem.ctx.get(), t, 0, 2, 1, 3);
}

void test_bits_of_a_plain_cache() {
    for (const char * mode : { "half", "full" }) {
        CHECK(ggml_ext_attention_set(mode) == 0, "%s", mode);
        for (int n_query : { 1, 3, 33, 100 }) {
            for (int n_cells : { 256, 1280 }) {
                Case c;
                c.whole = true, c.n_lane = c.n_stream = 2, c.n_query = n_query, c.n_cells = n_cells;
                c.sinks = n_query == 3, c.gqa = n_query == 1 ? 4 : 3;
                Problem problem(c, 1);
                // A lane sees no cell that it does not have.
                for (int64_t i = 0; i < ggml_nelements(problem.mask); ++i) {
                    const int cell = int(i % n_cells), lane = int(i / n_cells / n_query);
                    if (cell >= int(problem.cells[lane].size())) {
                        ((ggml_fp16_t *) problem.mask->data)[i] = ggml_fp32_to_fp16(-INFINITY);
                    }
                }
                ggml_tensor * plain =
                    ggml_flash_attn_ext(problem.ctx.get(), problem.q, cache(problem, 1, false), cache(problem, 1, true),
                                        problem.mask, 1.0f / std::sqrt(float(c.dk)), 0, 0);
                ggml_flash_attn_ext_add_sinks(plain, problem.sinks);
                Problem::run(plain, 2);
                const std::vector<float> got = problem.attend(1, 2);
                CHECK(std::memcmp(got.data(), plain->data, ggml_nbytes(plain)) == 0, "%s, %d queries, %d cells", mode,
                      n_query, n_cells);
            }
        }
    }
    ggml_ext_attention_set("default");
}

// A lane's only token that sees all of the lane, whose mask is looked at once: the bits that it has where a position that no
// list holds is hidden, so that each tile looks at the mask; and what a hidden row changes is seen.
void test_a_token_that_sees_all() {
    for (const int n_stream : { 1, 3 }) {
        Case c;
        c.n_stream = n_stream, c.n_lane = n_stream, c.n_query = 1, c.n_cells = 1024 * n_stream;
        Problem       problem(c, 60);
        ggml_fp16_t * mask  = (ggml_fp16_t *) problem.mask->data;
        const auto    shown = [&] {
            std::fill_n(mask, ggml_nelements(problem.mask), ggml_fp32_to_fp16(-INFINITY));
            for (int lane = 0; lane < c.n_lane; ++lane) {
                for (const int cell : problem.cells[lane]) {
                    mask[lane * c.n_cells + cell] = 0;
                }
            }
        };
        shown();
        const std::vector<float> open = problem.attend(0, 1);
        CHECK(open == problem.attend(0, 3), "threads change the result");
        CHECK(error(open, problem.reference(0)) < 0.01, "a token that sees all of %d lanes", c.n_lane);
        for (int lane = 0; lane < c.n_lane; ++lane) {
            std::vector<bool> held(problem.cells[lane].size());
            for (int list = 0; list < c.n_head_kv; ++list) {
                for (const Slot & slot : problem.held[lane * problem.n_lists() + list]) {
                    held[slot.position] = true;
                }
            }
            const auto gone = std::find(held.begin(), held.end(), false) - held.begin();
            CHECK(gone < int64_t(held.size()), "nothing was evicted");
            mask[lane * c.n_cells + problem.cells[lane][gone]] = ggml_fp32_to_fp16(-INFINITY);
        }
        CHECK(open == problem.attend(0, 2), "tiles that look at the mask have other bits");
        shown();
        for (int lane = 0; lane < c.n_lane; ++lane) {
            const Slot & last                                           = problem.held[lane * problem.n_lists()].back();
            mask[lane * c.n_cells + problem.cells[lane][last.position]] = ggml_fp32_to_fp16(-INFINITY);
        }
        const std::vector<float> hidden = problem.attend(0, 2);
        CHECK(open != hidden && error(hidden, problem.reference(0)) < 0.01, "a hidden row counts");
    }
}

}  // namespace

int main() {
    test_against_double();
    test_codes();
    test_bugs_are_seen();
    test_bits_of_a_plain_cache();
    test_a_token_that_sees_all();
    return check_done();
}
