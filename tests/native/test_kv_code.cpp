// kv_code on the CPU against its rule in double: each code is a nearest word of the key before RoPE, or of the value; with
// scores, positions of any size, 1 to 4 threads; and what kv_attend reads of it is the row that was coded.

#include "check.h"
#include "ggml-ext.h"
#include "kv_attend_problem.h"

#include <cmath>
#include <cstring>
#include <vector>

using namespace kv;

namespace {

constexpr int N_ROWS = 6, N_CODES = 5, N_MOVES = 150;  // blocks, and slots that are coded

struct Heads {
    CodesOf codes;
    int     dk = 64, dv = 64, n_head_kv = 2;
};

struct Coding {
    Coding(const Heads & of, unsigned seed) :
        of(of), random(seed), ctx(ggml_init({ size_t(64) << 20, nullptr, false }), ggml_free),
        codes(of.codes, of.dk, of.dv, of.n_head_kv, ctx.get(), random, N_CODES),
        block(ggml_ext_kv_block_of(GGML_TYPE_Q8_0, of.dk, GGML_TYPE_Q8_0, of.dv, true)),
        rows(ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I8, int64_t(block.size), N_ROWS)) {
        std::memset(codes.tensors.pool->data, 0x5a, ggml_nbytes(codes.tensors.pool));
        for (int slot = 0; slot < N_ROWS * SLOTS; ++slot) {
            char * to                                    = (char *) rows->data + slot / SLOTS * rows->nb[1];
            ((int32_t *) to)[slot % SLOTS]               = slot % 7 == 0 ? 16000000 + slot : int(random() % 20000);
            ((float *) (to + block.score))[slot % SLOTS] = float(slot) / 4;
            put(of.dk, to + block.k + slot % SLOTS * block.k_row);
            put(of.dv, to + block.v + slot % SLOTS * block.v_row);
        }
        std::vector<int32_t> from(N_ROWS * SLOTS), to(N_CODES * SLOTS);
        std::iota(from.begin(), from.end(), 0);
        std::iota(to.begin(), to.end(), 0);
        std::shuffle(from.begin(), from.end(), random);
        std::shuffle(to.begin(), to.end(), random);
        for (int i = 0; i < N_MOVES; ++i) {
            moves.insert(moves.end(), { from[i], to[i], i * of.n_head_kv / N_MOVES });
        }
    }

    void put(int d, char * row) {
        std::normal_distribution<float> dist(0, 0.3f);
        std::vector<float>              x(d);
        std::generate(x.begin(), x.end(), [&] { return dist(random); });
        ggml_quantize_chunk(GGML_TYPE_Q8_0, x.data(), row, 0, 1, d, nullptr);
    }

    void run(int n_threads) {
        ggml_tensor * list = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, 3, N_MOVES);
        std::memcpy(list->data, moves.data(), ggml_nbytes(list));
        const ggml_ext_kv_code_params params = { codes.tensors.p, of.dk, of.dv, 1 };
        Problem::run(ggml_ext_kv_code(ctx.get(), codes.tensors.pool, rows, list, codes.tensors.books,
                                      codes.tensors.angles, &params),
                     n_threads);
    }

    // Row of K before RoPE, or of V, that a move takes.
    std::vector<double> source(const int32_t * move, bool v) const {
        const char *             from = (const char *) rows->data + move[0] / SLOTS * rows->nb[1];
        const std::vector<float> row =
            Problem::decoded(GGML_TYPE_Q8_0, from + (v ? block.v : block.k), move[0] % SLOTS, v ? of.dv : of.dk);
        std::vector<double> x(row.begin(), row.end());
        if (!v) {
            x = codes.turned(x, -((const int32_t *) from)[move[0] % SLOTS]);
            std::for_each(x.begin(), x.begin() + of.codes.n_rot, [&](double & value) { value /= of.codes.length; });
        }
        return x;
    }

    static double distance(const double * x, const std::vector<double> & word) {
        double sum = 0;
        for (size_t i = 0; i < word.size(); ++i) {
            sum += std::pow(x[i] - word[i], 2);
        }
        return sum;
    }

    // Places whose code is no nearest word; a bug to see that the check can fail: "turned" takes keys of other positions.
    int wrong(const std::string & bug = "") const {
        int n = 0;
        for (size_t i = 0; i < moves.size(); i += 3) {
            const int32_t * move = moves.data() + i;
            CHECK(*codes.score(move[1]) == float(move[0]) / 4, "a score of slot %d", move[0]);
            for (const bool v : { false, true }) {
                std::vector<double> x = source(move, v);
                x                     = bug == "turned" && !v ? codes.turned(x, 1000) : x;
                for (int place = 0; place < int(x.size()) / of.codes.channels; ++place) {
                    const double * at   = x.data() + place * of.codes.channels;
                    double         best = INFINITY;
                    for (int word = 0; word < GGML_EXT_KV_WORDS; ++word) {
                        best = std::fmin(best, distance(at, codes.word(move[2], v, place, word)));
                    }
                    const int code = codes.codes(v, move[1])[place];
                    n += distance(at, codes.word(move[2], v, place, code)) > best * 1.0001 + 1e-4;
                }
            }
        }
        return n;
    }

    Heads                                                   of;
    std::mt19937                                            random;
    std::unique_ptr<ggml_context, void (*)(ggml_context *)> ctx;
    Codes                                                   codes;
    ggml_ext_kv_block                                       block;
    ggml_tensor *                                           rows;
    std::vector<int32_t>                                    moves;
};

void check(const Heads & of, const char * name) {
    Coding one(of, 3), four(of, 3);
    one.run(1);
    four.run(4);
    const ggml_tensor * pool = one.codes.tensors.pool;
    CHECK(std::memcmp(pool->data, four.codes.tensors.pool->data, ggml_nbytes(pool)) == 0, "%s: threads change codes",
          name);
    CHECK(one.wrong() == 0, "%s: %d codes are not the nearest", name, one.wrong());
    std::vector<bool> coded(N_CODES * SLOTS);
    for (size_t i = 0; i < one.moves.size(); i += 3) {
        coded[one.moves[i + 1]] = true;
    }
    for (int slot = 0; slot < N_CODES * SLOTS; ++slot) {
        CHECK(coded[slot] || *one.codes.codes(false, slot) == 0x5a, "%s: slot %d was written", name, slot);
        CHECK(*one.codes.position(slot) == 0x5a5a5a5a, "%s: a position was written", name);
    }
    if (of.codes.n_rot > 0) {
        CHECK(one.wrong("turned") > 100, "%s: keys of other positions are as near", name);
    }
}

void test_nearest_words() {
    std::mt19937                    random(1);
    std::normal_distribution<float> dist;
    for (const int channels : { 4, 8 }) {
        std::vector<float> words(256 * channels), x(100 * channels);
        std::generate(words.begin(), words.end(), [&] { return dist(random); });
        std::generate(x.begin(), x.end(), [&] { return dist(random); });
        std::copy_n(words.begin() + 7 * channels, channels, words.begin() + 200 * channels);
        std::copy_n(words.begin() + 7 * channels, channels, x.begin());  // two equally near
        std::vector<uint8_t> codes(100);
        CHECK(ggml_ext_nearest_words(100, channels, x.data(), words.data(), codes.data()) == 0, "nearest");
        CHECK(codes[0] == 7, "of equals %d", codes[0]);
        for (int i = 0; i < 100; ++i) {
            int best = 0;
            for (int k = 0; k < 256; ++k) {
                const std::vector<double> at(x.begin() + i * channels, x.begin() + (i + 1) * channels);
                const auto                word = [&](int w) {
                    return std::vector<double>(words.begin() + w * channels, words.begin() + (w + 1) * channels);
                };
                best = Coding::distance(at.data(), word(k)) < Coding::distance(at.data(), word(best)) ? k : best;
            }
            CHECK(codes[i] == best, "vector %d: word %d, nearest is %d", i, codes[i], best);
        }
        x[0] = NAN;
        CHECK(ggml_ext_nearest_words(1, channels, x.data(), words.data(), codes.data()) == 0, "of NaN any word");
    }
    CHECK(ggml_ext_nearest_words(1, 5, nullptr, nullptr, nullptr) == GGML_EXT_E_SHAPE, "5 channels");
    CHECK(ggml_ext_nearest_words(-1, 4, nullptr, nullptr, nullptr) == GGML_EXT_E_SHAPE, "-1 vectors");
}

}  // namespace

int main() {
    for (const int channels : { 4, 8 }) {
        Heads of;
        of.codes.channels = channels;
        check(of, "nothing turned");
        of.codes.n_rot = 64;
        check(of, "adjacent pairs");
        of.codes = { channels, 32, true, 1.25f };
        check(of, "pairs 16 apart, half of a head, lengthened");
        of.dk = 256, of.dv = 96, of.n_head_kv = 1, of.codes.n_rot = 256;
        check(of, "heads of 256 and 96");
    }
    test_nearest_words();
    return check_done();
}
