// GGML_EXT_OP_KV_CODE on the CPU: the nearest words of the codebooks. Threads share the moves.

#include "kv_code/kv_code.h"

#include "cold.h"
#include "core/cpu/ext_op.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-ext.h"
#include "ggml-impl.h"

#include <string.h>

#define WORDS     GGML_EXT_KV_WORDS
#define LANES     16
#define MOST_HEAD 1024
#define BATCH     64  // moves that the words of a place are loaded for

// The words of one place, by channel, and half of their squares' sums.
struct kv_code_words {
    float x[8][WORDS];
    float half[WORDS];
};

static void kv_code_add(int c, int k, const float * word, struct kv_code_words * out) {
    out->half[k] = 0;
    for (int i = 0; i < c; i++) {
        out->x[i][k] = word[i];
        out->half[k] += 0.5f * word[i] * word[i];
    }
}

static void kv_code_load(int c, float scale, const int8_t * words, struct kv_code_words * out) {
    for (int k = 0; k < WORDS; k++) {
        float word[8];
        for (int i = 0; i < c; i++) {
            word[i] = scale * words[k * c + i];
        }
        kv_code_add(c, k, word, out);
    }
}

// Of equally near words the first; for values that are not finite any. c is a constant wherever this is inlined.
static inline uint8_t kv_code_nearest_of(const int c, const struct kv_code_words * words, const float * x) {
    float d[WORDS];
    for (int k = 0; k < WORDS; k++) {
        d[k] = words->half[k];
        for (int i = 0; i < c; i++) {
            d[k] -= x[i] * words->x[i][k];
        }
    }
    float best[LANES];  // the least first and its place after, since compilers make no vectors of both at once
    memcpy(best, d, sizeof(best));
    for (int k = LANES; k < WORDS; k += LANES) {
        for (int l = 0; l < LANES; l++) {
            best[l] = d[k + l] < best[l] ? d[k + l] : best[l];
        }
    }
    float least = best[0];
    for (int l = 1; l < LANES; l++) {
        least = best[l] < least ? best[l] : least;
    }
    int k = 0;
    while (k < WORDS - 1 && d[k] != least) {
        k++;
    }
    return (uint8_t) k;
}

static uint8_t kv_code_nearest(int c, const struct kv_code_words * words, const float * x) {
    return c == 4 ? kv_code_nearest_of(4, words, x) : kv_code_nearest_of(8, words, x);
}

int32_t ggml_ext_nearest_words(int64_t n, int32_t channels, const float * x, const float * words, uint8_t * codes) {
    if (n < 0 || (channels != 4 && channels != 8)) {
        return GGML_EXT_E_SHAPE;
    }
    struct kv_code_words all;
    for (int k = 0; k < WORDS; k++) {
        kv_code_add(channels, k, words + k * channels, &all);
    }
    for (int64_t i = 0; i < n; i++) {
        codes[i] = kv_code_nearest(channels, &all, x + i * channels);
    }
    return 0;
}

struct kv_code_batch {
    struct kv_code_words words;
    float                x[BATCH][MOST_HEAD];
};

struct kv_code_op {
    struct ggml_ext_kv_code_params p;
    struct ggml_ext_kv_cold        cold;
    struct ggml_ext_kv_block       rows;
    const struct ggml_tensor *     hot;
    char *                         blocks;  // of codes
    size_t                         stride;
};

static char * kv_code_block(const struct kv_code_op * op, const int32_t * move) {
    return op->blocks + move[1] / GGML_EXT_KV_SLOTS * op->stride;
}

static const char * kv_code_rows(const struct kv_code_op * op, const int32_t * move) {
    return (const char *) op->hot->data + move[0] / GGML_EXT_KV_SLOTS * op->hot->nb[1];
}

// Codes of K or V of n moves of one head.
static void kv_code_encode(const struct kv_code_op * op, const int32_t * moves, int n, bool v,
                           struct kv_code_batch * batch) {
    const struct ggml_ext_kv_cold * cold  = &op->cold;
    const char *                    books = (const char *) cold->books->data + moves[2] * cold->books->nb[1];
    const int                       c     = cold->p.channels;
    const int                       d     = v ? cold->dv : cold->dk;
    const float *                   scale = (const float *) (books + (v ? cold->layout.v_scale : 0));
    const int8_t *                  words = (const int8_t *) (books + (v ? cold->layout.v : cold->layout.k));
    const ggml_to_float_t           from  = ggml_get_type_traits(GGML_TYPE_Q8_0)->to_float;
    for (int i = 0; i < n; i++) {
        const int32_t * move  = moves + 3 * i;
        const char *    block = kv_code_rows(op, move);
        const int       slot  = move[0] % GGML_EXT_KV_SLOTS;
        from(block + (v ? op->rows.v + slot * op->rows.v_row : op->rows.k + slot * op->rows.k_row), batch->x[i], d);
        if (!v) {
            ggml_ext_kv_cold_turn(cold, ((const int32_t *) block)[slot], true, batch->x[i]);
        }
    }
    for (int place = 0; place < d / c; place++) {
        kv_code_load(c, scale[place], words + (size_t) place * WORDS * c, &batch->words);
        for (int i = 0; i < n; i++) {
            const int32_t * move = moves + 3 * i;
            uint8_t *       row  = (uint8_t *) kv_code_block(op, move) + (v ? cold->block.v : cold->block.k) +
                            move[1] % GGML_EXT_KV_SLOTS * (v ? cold->block.v_row : cold->block.k_row);
            row[place] = kv_code_nearest(c, &batch->words, batch->x[i] + place * c);
        }
    }
}

static void kv_code_score(const struct kv_code_op * op, const int32_t * move) {
    const float * from              = (const float *) (kv_code_rows(op, move) + op->rows.score);
    float *       to                = (float *) (kv_code_block(op, move) + op->cold.block.score);
    to[move[1] % GGML_EXT_KV_SLOTS] = from[move[0] % GGML_EXT_KV_SLOTS];
}

static size_t kv_code_work_size(const struct ggml_tensor * dst, int n_threads) {
    GGML_UNUSED(dst);
    return 64 + sizeof(struct kv_code_batch) * n_threads;
}

static void kv_code_compute(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct ggml_ext_kv_code_params p     = ggml_ext_kv_code_params_of(dst);
    const struct ggml_tensor *           moves = dst->src[2];
    const int32_t *                      all   = moves->data;
    const struct kv_code_op              op    = {
                        .p      = p,
                        .cold   = ggml_ext_kv_cold_of(&p.cold, p.dk, p.dv, dst->src[0], dst->src[3], dst->src[4]),
                        .rows   = ggml_ext_kv_block_of(GGML_TYPE_Q8_0, p.dk, GGML_TYPE_Q8_0, p.dv, false),
                        .hot    = dst->src[1],
                        .blocks = dst->data,
                        .stride = dst->nb[1],
    };
    char *                 base  = (char *) GGML_PAD((uintptr_t) params->wdata, 64);
    struct kv_code_batch * batch = (struct kv_code_batch *) base + params->ith;

    const int64_t per   = (moves->ne[1] + params->nth - 1) / params->nth;
    const int64_t begin = MIN(moves->ne[1], per * params->ith), end = MIN(moves->ne[1], begin + per);
    for (int64_t i = begin; i < end;) {
        int n = 0;
        for (; n < BATCH && i + n < end && all[3 * (i + n) + 2] == all[3 * i + 2]; n++) {
            const int32_t * move = all + 3 * (i + n);
            GGML_ASSERT(move[0] >= 0 && move[0] < op.hot->ne[1] * GGML_EXT_KV_SLOTS && move[1] >= 0 &&
                        move[1] < dst->ne[1] * GGML_EXT_KV_SLOTS && move[2] >= 0 && move[2] < op.cold.books->ne[1] &&
                        "ggml-ext: kv_code: a move between slots of the pools");
        }
        kv_code_encode(&op, all + 3 * i, n, false, batch);
        kv_code_encode(&op, all + 3 * i, n, true, batch);
        for (int j = 0; j < n && p.scored; j++) {
            kv_code_score(&op, all + 3 * (i + j));
        }
        i += n;
    }
}

const struct ggml_ext_cpu_op ggml_ext_cpu_kv_code = { kv_code_compute, NULL, kv_code_work_size };
