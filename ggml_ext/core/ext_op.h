// GGML_OP_EXT: the one op of ours that upstream's enum holds. A sub-op id in op_params[0] says what
// it computes; op_params[1..] and src[] belong to the sub-op. Adding a sub-op: docs/adding-an-op.md.

#ifndef GGML_EXT_OP_H
#define GGML_EXT_OP_H

#include "ggml.h"
#include "kv_code/cold.h"

#ifdef __cplusplus
extern "C" {
#endif

// Ids go over RPC: never renumber.
enum ggml_ext_op {
    GGML_EXT_OP_SCALE_ADD = 0,
    GGML_EXT_OP_KRON      = 1,
    GGML_EXT_OP_ACT_ROUND = 2,
    GGML_EXT_OP_SAMPLE    = 3,
    GGML_EXT_OP_KV_STORE  = 4,
    GGML_EXT_OP_KV_ATTEND = 5,
    GGML_EXT_OP_KV_SCORE  = 6,
    GGML_EXT_OP_KV_CODE   = 7,
    GGML_EXT_OP_COUNT,
};

// Name of a sub-op ("scale_add"), or "unknown" for an id that this build does not have.
GGML_API const char * ggml_ext_op_name(int32_t sub_op);

// NULL where the parameters, sources and result of a GGML_OP_EXT tensor fit its sub-op as the constructor would have made
// it; else what does not. A graph that came over RPC was made by no constructor of this process, so backends ask before they
// compute. Looks at no data.
GGML_API const char * ggml_ext_op_fault(const struct ggml_tensor * tensor);

// The sub-op id of a GGML_OP_EXT tensor.
static inline int32_t ggml_ext_get_op(const struct ggml_tensor * tensor) {
    return tensor->op_params[0];
}

// scale * a + b, element by element: the plainest sub-op, kept as the test of the dispatch and as
// the example of docs/adding-an-op.md.
// a, b: F32, same shape, rows contiguous (nb[0] == 4). Result: F32, shape of a.
GGML_API struct ggml_tensor * ggml_ext_scale_add(struct ggml_context * ctx, struct ggml_tensor * a,
                                                 struct ggml_tensor * b, float scale);

// A Kronecker transform of every row of x (a token's n = n1 n2 channels, ne0): with the row read as
// X[n1][n2], row-major, the result's row is left^T X right, optionally clipped (FlatQuant,
// arXiv 2410.09426, section 3.2). docs/kron.md has the mathematics and the measurements.
//   x:           F32, any ne1..ne3, nb0 == 4, other strides arbitrary.
//   left, right: [n1, n1] and [n2, n2], F32 or F16, contiguous, in C order (ne0 is the output index);
//                NULL is the identity of the order that follows from n. n1 alone is the one-sided
//                form over attention heads.
//   hadamard:    order, a power of two, of a normalised Walsh-Hadamard matrix (Sylvester's order) in
//                the place of right, which must be NULL; 0 or 1: none.
//   clip:        in (0, 1]: each result row is clamped to +-clip * max|row|; 1: not clamped. Without
//                any factor it must be below 1.
// Result: F32, contiguous, shape of x. Identity factors give x back exactly on the CPU (a zero may lose its sign).
// NaN stays NaN and counts for no maximum.
GGML_API struct ggml_tensor * ggml_ext_kron(struct ggml_context * ctx, struct ggml_tensor * x,
                                            struct ggml_tensor * left, struct ggml_tensor * right, int hadamard,
                                            float clip);

// Rounds activations to a symmetric integer grid and back. In each group of `group` values along ne0
// (0: the whole row; the last group may be shorter)
//     scale = max|x| / q_max, q_max = 2^(bits - 1) - 1, y = scale * clamp(rint(x / scale), -q_max, q_max)
// with ties to even. A group of zeros stays zero, NaN stays NaN and counts for no maximum, an Inf
// makes its group NaN.
// x: F32, nb0 == 4, other strides arbitrary; bits: 2..8. Result: F32, contiguous, shape of x.
GGML_API struct ggml_tensor * ggml_ext_act_round(struct ggml_context * ctx, struct ggml_tensor * x, int bits,
                                                 int group);

// What a row is sampled with; the stages come in the order of the fields. A row of I32 words in the op's parameters.
struct ggml_ext_sample_params {
    int32_t  top_k;        // <= 0: off
    float    top_p;        // >= 1: off
    double   log_min_p;    // ln(min_p); -Inf: off
    int32_t  min_keep;     // top-p and min-p keep at least so many tokens
    float    temperature;  // <= 0: the largest logit, the lowest id of equal ones
    uint64_t uniform;      // the draw's random number, in units of 2^-64
};

#define GGML_EXT_SAMPLE_WORDS     8          // of 4 bytes, in ggml_ext_sample_params
#define GGML_EXT_SAMPLE_MAX_VOCAB (1 << 22)  // sums of masses stay below 2^63

// Draws a token per row by top-k, top-p, min-p and temperature, in this order (docs/sampling.md, "On a backend").
//   logits:     F32 [n_vocab, n_rows], nb0 == 4, 1 <= n_vocab <= GGML_EXT_SAMPLE_MAX_VOCAB.
//   parameters: I32 [GGML_EXT_SAMPLE_WORDS, n_rows], nb0 == 4: a struct ggml_ext_sample_params per row.
//   ids:        I32 [n_vocab, n_rows], nb0 == 4: the tokens that the places of a row stand for; NULL: 0, 1, ... Of equal
//               logits the lower place comes first, and the draw goes through the places in their order.
// Result: I32 [n_rows], the token, or -1 where a logit is NaN or +Inf, or none is finite. A logit of -Inf is no
// candidate. All backends give the same tokens: sums are of integers, so their order does not matter.
GGML_API struct ggml_tensor * ggml_ext_sample(struct ggml_context * ctx, struct ggml_tensor * logits,
                                              struct ggml_tensor * parameters, struct ggml_tensor * ids);

// Writes heads into slots of a paged KV cache's pool (docs/kv-cache.md).
//   pool:   I8 [block_bytes, n_blocks], contiguous; kv_store/block.h lays a block out.
//   x:      F32 [d, n_head_kv, n_tokens], nb0 == 4, other strides arbitrary.
//   slots:  I32 [n_head_kv, n_tokens], nb0 == 4: block * 64 + slot, each at most once.
//   cells:  not read; a tensor that the graph must allocate, or NULL: what llama.cpp stores by, which it fills unasked.
//   keys:   as x: a head's score, an F32, becomes minus the sum of its squares; or F32 [1, n_head_kv, n_tokens]: the
//           scores; or NULL: +Inf, a score that kv_score has yet to give.
//   type:   of the stored rows; its blocks divide d.
//   offset: bytes from a block's start to its rows.
//   score:  bytes from a block's start to its scores, a multiple of 4; 0: none are written, and keys is NULL.
// Result: a view of pool, which whatever reads the rows has to take.
GGML_API struct ggml_tensor * ggml_ext_kv_store(struct ggml_context * ctx, struct ggml_tensor * pool,
                                                struct ggml_tensor * x, struct ggml_tensor * slots,
                                                struct ggml_tensor * cells, struct ggml_tensor * keys,
                                                enum ggml_type type, int offset, int score);

struct ggml_ext_kv_attend_params {
    int32_t type_k, type_v;  // enum ggml_type
    int32_t dk, dv;          // channels of a head
    int32_t n_head_kv;
    int32_t first_list;      // of the layer's heads, whose lists are adjacent
    int32_t n_lists;         // of a lane
    float   scale, max_bias;
    float   cap;             // of the logits; 0: none
    int32_t n_keys;          // that the longest list holds at most, where tasks are cut by it; 0: the mask's columns
};

// Coupled codes of a layer (kv_code/cold.h lays pool and books out).
struct ggml_ext_kv_codes {
    struct ggml_tensor *           pool;    // I8 [block_bytes, n_blocks], contiguous
    struct ggml_tensor *           books;   // I8 [bytes of a head, n_head_kv], contiguous
    struct ggml_tensor *           angles;  // F32 [n_rot, 8192], contiguous; NULL where n_rot is 0
    struct ggml_ext_kv_cold_params p;
};

// Attention of queries over the blocks of their lanes' lists, as docs/attention.md computes it. A lane is what one
// sequence sees: for each layer and head a list of runs of slots. A slot holds the token's position; the lane says in
// which cell of llama.cpp's cache that token is, and so in which column of the mask.
//   q:     F32 [dk, n_queries, n_head, n_streams], nb0 == 4. Token t is query t mod n_queries of stream t / n_queries.
//   pool:  I8 [block_bytes, n_blocks], contiguous.
//   table: I32: n_lanes * n_lists + 1 offsets, then entries (struct ggml_ext_kv_entry); list i of lane l has entries
//          offset[l n_lists + i] .. offset[l n_lists + i + 1] - 1. What follows the last one is not read.
//   cells: I32 [n_positions, n_lanes], contiguous.
//   order: I32 [n_lanes + 1 + n_tokens]: where each lane's tokens start, n_tokens, then the tokens by lane.
//   mask:  F16 [n_cells, n_queries, *, *], nb0 == 2.
//   sinks: F32 [n_head] or NULL.
//   codes: old tokens' codes, or NULL. An entry's block n_blocks + i is block i of theirs, and K and V are q8_0.
// Result: F32 [dv, n_head, n_queries, n_streams].
GGML_API struct ggml_tensor * ggml_ext_kv_attend(struct ggml_context * ctx, struct ggml_tensor * q,
                                                 struct ggml_tensor * pool, struct ggml_tensor * table,
                                                 struct ggml_tensor * cells, struct ggml_tensor * order,
                                                 struct ggml_tensor * mask, struct ggml_tensor * sinks,
                                                 const struct ggml_ext_kv_attend_params * params,
                                                 const struct ggml_ext_kv_codes *         codes);

struct ggml_ext_kv_score_params {
    struct ggml_ext_kv_attend_params attend;
    int32_t
        window;  // queries that look, at most: the latest ones of a lane; of a lane with fewer than a quarter none look
    int32_t recent;  // positions at a list's end that are not scored
    int32_t score;   // bytes from a block's start to its scores, a multiple of 4
    float   decay;   // of the score that was there, 0 .. 1
};

// What the latest queries of each lane look at, into the scores of the slots of its lists (KV-Compress, arXiv 2410.00161):
//     a = mean over queries of the sum over the KV head's query heads of p^2, p being the attention's probability
//     score = a where it was +Inf, else max(decay * score, a)
// A query that is NaN or Inf, or sees such a key, counts as looking at nothing. Sources as of kv_attend, in whose rounding p
// is computed. Result: a view of pool.
GGML_API struct ggml_tensor * ggml_ext_kv_score(struct ggml_context * ctx, struct ggml_tensor * q,
                                                struct ggml_tensor * pool, struct ggml_tensor * table,
                                                struct ggml_tensor * cells, struct ggml_tensor * order,
                                                struct ggml_tensor * mask, struct ggml_tensor * sinks,
                                                const struct ggml_ext_kv_score_params * params);

struct ggml_ext_kv_code_params {
    struct ggml_ext_kv_cold_params cold;
    int32_t                        dk, dv;
    int32_t                        scored;  // whether slots have scores, which go with them
};

// Writes slots' rows, which are q8_0, as coupled codes: for each place of a head the nearest of its 256 words, of V's channels
// and of K's before RoPE, by the positions that the slots of rows hold.
//   pool, books, angles: as kv_attend's codes have them.
//   rows:  I8 [block_bytes, n_blocks], contiguous: the pool that the slots are in.
//   moves: I32 [3, n_moves], contiguous: slot of rows, slot of pool, head; each slot of pool at most once.
// Result: a view of pool.
GGML_API struct ggml_tensor * ggml_ext_kv_code(struct ggml_context * ctx, struct ggml_tensor * pool,
                                               struct ggml_tensor * rows, struct ggml_tensor * moves,
                                               struct ggml_tensor * books, struct ggml_tensor * angles,
                                               const struct ggml_ext_kv_code_params * params);

#ifdef __cplusplus
}
#endif

#endif  // GGML_EXT_OP_H
