// What the CPU backend refuses of the paged cache's sub-ops that no constructor made, as a peer sends them over RPC: the
// parameters and shapes of a node, and what only its data says.

#include "check.h"
#include "ext_assert.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

namespace {

// One lane, one list of one run, one query; what differs comes from a peer.
struct Attend {
    std::vector<int32_t> table    = { 0, 1, 0, 1 << 16 };  // offsets, block 0, begin 0 and count 1
    int32_t              position = 0, cell = 0;
    std::vector<int32_t> order      = { 0, 1, 0 };
    int32_t              type       = GGML_TYPE_Q8_0;
    int64_t              block      = 256 + 2 * 64 * 34;
    int32_t              n_lists    = 1;
    int64_t              n_cells    = 4;
    int64_t              mask_heads = 1, mask_streams = 1;
    // As kv_score, behind the same parameters.
    bool                 score  = false;
    int32_t              window = 1, recent = 1, offset = 256 + 2 * 64 * 34;
    float                decay    = 1;
    size_t               stride   = 0;  // of the result's blocks; 0: the pool's
    // Coupled codes beside the rows.
    bool                 codes    = false;
    int32_t              channels = 4, n_rot = 0;
    float                length     = 1;
    int64_t              code_block = 256 + 2 * 64 * 8, book = 64 + 2 * 256 * 32, turns = 2 * GGML_EXT_KV_TURN;
    bool                 angles = false;
};

Node attend(Tensors & t, const Attend & a) {
    const auto integers = [&](const std::vector<int32_t> & values) {
        ggml_tensor * tensor = table(t, GGML_TYPE_I32, int64_t(values.size()), 1);
        std::memcpy(tensor->data, values.data(), ggml_nbytes(tensor));
        return tensor;
    };
    ggml_tensor * pool = table(t, GGML_TYPE_I8, a.block, 2);
    std::memset(pool->data, 0, ggml_nbytes(pool));
    std::memcpy(pool->data, &a.position, sizeof(a.position));
    ggml_tensor * q    = table(t, GGML_TYPE_F32, 32, 1);
    ggml_tensor * mask = table(t, GGML_TYPE_F16, a.n_cells, 1);
    mask->ne[2] = a.mask_heads, mask->ne[3] = a.mask_streams;
    std::memset(q->data, 0, ggml_nbytes(q));
    std::memset(mask->data, 0, ggml_nbytes(mask));
    const ggml_ext_kv_attend_params params = { a.type, a.type, 32, 32, 1, 0, a.n_lists, 1, 0, 0, 0 };
    std::vector<int32_t>            words(sizeof(params) / sizeof(int32_t));
    std::memcpy(words.data(), &params, sizeof(params));
    const auto with = [&](const std::vector<ggml_tensor *> & behind) {
        std::vector<ggml_tensor *> sources = {
            q, pool, integers(a.table), integers({ a.cell }), integers(a.order), mask
        };
        sources.insert(sources.end(), behind.begin(), behind.end());
        return sources;
    };
    std::vector<ggml_tensor *> behind;
    if (a.codes) {
        ggml_tensor * codes = table(t, GGML_TYPE_I8, a.code_block, 1);
        std::memset(codes->data, 0, ggml_nbytes(codes));
        ggml_tensor * books = table(t, GGML_TYPE_I8, a.book, 1);
        std::memset(books->data, 0, ggml_nbytes(books));
        ggml_tensor * angles = a.angles ? ggml_new_tensor_2d(t.ctx, GGML_TYPE_F32, 2, a.turns) : nullptr;
        behind               = { nullptr, codes, books, angles };
    }
    if (a.score) {
        int32_t decay;
        std::memcpy(&decay, &a.decay, sizeof(decay));
        words.insert(words.end(), { a.window, a.recent, a.offset, decay });
        ggml_tensor * result = ggml_view_tensor(t.ctx, pool);
        result->nb[1]        = a.stride ? a.stride : result->nb[1];
        return { GGML_EXT_OP_KV_SCORE, result, with(behind), words };
    }
    int32_t length;
    std::memcpy(&length, &a.length, sizeof(length));
    words.insert(words.end(), { a.channels, a.n_rot, 0, length });
    return { GGML_EXT_OP_KV_ATTEND, table(t, GGML_TYPE_F32, 32, 1), with(behind), words };
}

void expect_attend(const char * reason, const std::function<void(Attend &)> & change) {
    expect_text(reason, compute([&](Tensors & t) {
                    Attend a;
                    change(a);
                    return attend(t, a);
                }));
}

void test_kv() {
    expect_attend("not refused", [](Attend &) {});
    expect_attend("q8_0, q5_0, q4_0, iq4_nl or f16", [](Attend & a) { a.type = GGML_TYPE_Q2_K; });
    expect_attend("q8_0, q5_0, q4_0, iq4_nl or f16", [](Attend & a) { a.type = 4; });  // a type that is gone
    expect_attend("that the rows fit in", [](Attend & a) { a.block = 256; });
    expect_attend("that the rows fit in", [](Attend & a) { a.block += 4; });
    expect_attend("a lane's lists hold", [](Attend & a) { a.n_lists = 0; });
    expect_attend("an offset per list", [](Attend & a) { a.n_lists = 4; });
    expect_attend("order is I32", [](Attend & a) { a.order.push_back(0); });
    // What only the data says.
    expect_attend("a run of a block", [](Attend & a) { a.table[2] = 2; });
    expect_attend("a run of a block", [](Attend & a) { a.table[2] = -1; });
    expect_attend("a run of a block", [](Attend & a) { a.table[3] = 65 << 16; });
    expect_attend("a run of a block", [](Attend & a) { a.table[3] = 2 << 16 | 63; });
    expect_attend("the table's sums", [](Attend & a) { a.table[1] = 2; });
    expect_attend("the lists' offsets", [](Attend & a) { a.table = { 0, 2, 1, 0, 1 << 16 }, a.n_lists = 2; });
    expect_attend("the table's sums", [](Attend & a) { a.order[1] = 2; });
    expect_attend("a token", [](Attend & a) { a.order[2] = 1; });
    expect_attend("a position", [](Attend & a) { a.position = 1; });
    expect_attend("a cell", [](Attend & a) { a.cell = 4; });
    expect_attend("a cell", [](Attend & a) { a.cell = -1; });

    expect_attend("mask is F16", [](Attend & a) { a.mask_heads = 0; });
    expect_attend("mask is F16", [](Attend & a) { a.mask_streams = 0; });

    const auto expect_codes = [](const char * reason, const std::function<void(Attend &)> & change) {
        expect_attend(reason, [&](Attend & a) {
            a.codes    = true;
            a.table[2] = 2;  // the codes' only block
            change(a);
        });
    };
    expect_codes("not refused", [](Attend &) {});
    expect_codes("a run of a block", [](Attend & a) { a.table[2] = 3; });
    expect_codes("4 or 8 channels", [](Attend & a) { a.channels = 5; });
    expect_codes("4 or 8 channels", [](Attend & a) { a.channels = 0; });
    expect_codes("that the codes fit in", [](Attend & a) { a.channels = 4, a.code_block -= 64; });
    expect_codes("books is I8", [](Attend & a) { a.book -= 64; });
    expect_codes("not refused", [](Attend & a) { a.channels = 8; });  // books of one size
    expect_codes("an even number of K's channels", [](Attend & a) { a.n_rot = 3; });
    expect_codes("an even number of K's channels", [](Attend & a) { a.n_rot = 34; });
    expect_codes("an even number of K's channels", [](Attend & a) { a.n_rot = -2; });
    expect_codes("an even number of K's channels", [](Attend & a) { a.length = NAN; });
    expect_codes("an even number of K's channels", [](Attend & a) { a.length = 0; });
    expect_codes("angles is F32", [](Attend & a) { a.n_rot = 2; });
    expect_codes("angles is F32", [](Attend & a) { a.n_rot = 4, a.angles = true; });
    expect_codes("angles is F32", [](Attend & a) { a.n_rot = 2, a.angles = true, a.turns--; });
    expect_codes("not refused", [](Attend & a) { a.n_rot = 2, a.angles = true; });

    // Slot of the rows, of the codes, head; heads: of the codebooks.
    const auto code = [](std::vector<int32_t> move, int64_t heads, int64_t block, size_t stride = 256 + 2 * 64 * 8) {
        return compute([=](Tensors & t) {
            ggml_tensor * pool  = table(t, GGML_TYPE_I8, 256 + 2 * 64 * 8, 2);
            ggml_tensor * rows  = table(t, GGML_TYPE_I8, block, 2);
            ggml_tensor * moves = table(t, GGML_TYPE_I32, int64_t(move.size()), 1);
            ggml_tensor * books = table(t, GGML_TYPE_I8, 64 + 2 * 256 * 32, heads);
            for (ggml_tensor * tensor : { pool, rows, books }) {
                std::memset(tensor->data, 0, ggml_nbytes(tensor));
            }
            std::copy(move.begin(), move.end(), (int32_t *) moves->data);
            ggml_tensor * result = ggml_view_tensor(t.ctx, pool);
            result->nb[1]        = stride;
            const float length   = 1;
            int32_t     bits;
            std::memcpy(&bits, &length, sizeof(bits));
            return Node{
                GGML_EXT_OP_KV_CODE, result, { pool, rows, moves, books },
                  { 4, 0, 0, bits, 32, 32, 0 }
            };
        });
    };
    const int64_t row_block = 256 + 2 * 64 * 34;
    expect_text("not refused", code({ 127, 127, 0 }, 1, row_block));
    expect_text("a move between slots", code({ 128, 0, 0 }, 1, row_block));
    expect_text("a move between slots", code({ -1, 0, 0 }, 1, row_block));
    expect_text("a move between slots", code({ 0, 128, 0 }, 1, row_block));
    expect_text("a move between slots", code({ 0, -1, 0 }, 1, row_block));
    expect_text("a move between slots", code({ 0, 0, 1 }, 1, row_block));
    expect_text("a move between slots", code({ 0, 0, -1 }, 1, row_block));
    expect_text("moves is I32", code({ 0, 0 }, 1, row_block));
    expect_text("rows' pool", code({ 0, 0, 0 }, 1, row_block - 64));
    expect_text("a view of the codes' pool", code({ 0, 0, 0 }, 1, row_block, 2 * (256 + 2 * 64 * 8)));

    const auto expect_score = [](const char * reason, const std::function<void(Attend &)> & change) {
        expect_attend(reason, [&](Attend & a) {
            a.score = true;
            a.block += 256;
            change(a);
        });
    };
    expect_score("not refused", [](Attend &) {});
    expect_score("a run of a block", [](Attend & a) { a.table[2] = 2; });
    expect_score("the table's sums", [](Attend & a) { a.order[1] = 2; });
    expect_score("a position", [](Attend & a) { a.position = 1; });
    expect_score("a cell", [](Attend & a) { a.cell = 4; });
    expect_score("mask is F16", [](Attend & a) { a.mask_heads = 0; });
    expect_score("a window of 1 to 1024", [](Attend & a) { a.window = 0; });
    expect_score("a window of 1 to 1024", [](Attend & a) { a.window = 1025; });
    expect_score("a window of 1 to 1024", [](Attend & a) { a.recent = 0; });
    expect_score("a window of 1 to 1024", [](Attend & a) { a.decay = NAN; });
    expect_score("a window of 1 to 1024", [](Attend & a) { a.decay = 1.5f; });
    expect_score("the scores fit", [](Attend & a) { a.offset -= 4; });
    expect_score("the scores fit", [](Attend & a) { a.offset += 4; });
    expect_score("the scores fit", [](Attend & a) { a.offset = -256; });
    expect_score("a view of the pool", [](Attend & a) { a.stride = 2 * (256 + 2 * 64 * 34 + 256) - 1; });

    expect_score("codes are not scored", [](Attend & a) { a.codes = true; });

    const auto strided = [](size_t stride) {
        return compute([=](Tensors & t) {
            ggml_tensor * pool   = table(t, GGML_TYPE_I8, 256 + 64 * 34, 2);
            ggml_tensor * slots  = table(t, GGML_TYPE_I32, 1, 1);
            ggml_tensor * x      = ggml_new_tensor_3d(t.ctx, GGML_TYPE_F32, 32, 1, 1);
            ggml_tensor * result = ggml_view_tensor(t.ctx, pool);
            std::memset(x->data, 0, ggml_nbytes(x));
            ((int32_t *) slots->data)[0] = 64;
            result->nb[0]                = stride == pool->nb[1] ? 1 : 0;
            result->nb[1]                = stride;
            return Node{
                GGML_EXT_OP_KV_STORE, result, { pool, x, slots },
                  { GGML_TYPE_Q8_0, 256 }
            };
        });
    };
    expect_text("not refused", strided(256 + 64 * 34));
    expect_text("a view of the pool", strided(2 * (256 + 64 * 34) - 1));

    const auto store = [](int32_t type, int32_t offset, int32_t slot, int64_t n_slots) {
        return compute([=](Tensors & t) {
            ggml_tensor * pool  = table(t, GGML_TYPE_I8, 256 + 64 * 34, 2);
            ggml_tensor * slots = table(t, GGML_TYPE_I32, 1, n_slots);
            ggml_tensor * x     = ggml_new_tensor_3d(t.ctx, GGML_TYPE_F32, 32, 1, 1);
            std::memset(x->data, 0, ggml_nbytes(x));
            std::fill_n((int32_t *) slots->data, n_slots, slot);
            return Node{
                GGML_EXT_OP_KV_STORE, ggml_view_tensor(t.ctx, pool), { pool, x, slots },
                   { type, offset }
            };
        });
    };
    expect_text("not refused", store(GGML_TYPE_Q8_0, 256, 127, 1));
    expect_text("a slot of the pool", store(GGML_TYPE_Q8_0, 256, 128, 1));
    expect_text("a slot of the pool", store(GGML_TYPE_Q8_0, 256, -1, 1));
    expect_text("slots is I32", store(GGML_TYPE_Q8_0, 256, 0, 2));
    expect_text("that the rows fit in", store(GGML_TYPE_Q8_0, 320, 0, 1));
    expect_text("that the rows fit in", store(GGML_TYPE_Q8_0, -64, 0, 1));
    expect_text("the type's blocks divide", store(GGML_TYPE_Q4_K, 256, 0, 1));
    expect_text("the type's blocks divide", store(-1, 256, 0, 1));

    // score: where; channels: of the keys, 0: none.
    const auto scored = [](int32_t score, int64_t channels) {
        return compute([=](Tensors & t) {
            ggml_tensor * pool  = table(t, GGML_TYPE_I8, 256 + 64 * 34 + 256, 2);
            ggml_tensor * slots = table(t, GGML_TYPE_I32, 1, 1);
            ggml_tensor * x     = ggml_new_tensor_3d(t.ctx, GGML_TYPE_F32, 32, 1, 1);
            ggml_tensor * keys  = channels ? ggml_new_tensor_3d(t.ctx, GGML_TYPE_F32, channels, 1, 1) : nullptr;
            std::memset(x->data, 0, ggml_nbytes(x));
            std::memset(slots->data, 0, ggml_nbytes(slots));
            return Node{
                GGML_EXT_OP_KV_STORE,
                ggml_view_tensor(t.ctx, pool),
                { pool, x, slots, nullptr, keys },
                { GGML_TYPE_Q8_0, 256, score }
            };
        });
    };
    expect_text("not refused", scored(256 + 64 * 34, 32));
    expect_text("the scores fit", scored(256 + 64 * 34 + 4, 32));
    expect_text("the scores fit", scored(258, 32));
    expect_text("the scores fit", scored(-4, 32));
    expect_text("the scores fit", scored(0, 32));
    expect_text("not refused", scored(256 + 64 * 34, 0));
    expect_text("the scores fit", scored(256 + 64 * 34 + 4, 0));
    expect_text("not refused", scored(256 + 64 * 34, 1));
    expect_text("keys is as x", scored(256 + 64 * 34, 64));
}

}  // namespace

int main() {
    setenv("GGML_NO_BACKTRACE", "1", 1);
    test_kv();
    return check_done();
}
