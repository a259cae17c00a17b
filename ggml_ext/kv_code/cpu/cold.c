#include "cold.h"

#define GGML_COMMON_DECL_C
#include "ggml-common.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "simd-mappings.h"

#include <string.h>

struct ggml_ext_kv_cold ggml_ext_kv_cold_of(const struct ggml_ext_kv_cold_params * p, int dk, int dv,
                                            const struct ggml_tensor * pool, const struct ggml_tensor * books,
                                            const struct ggml_tensor * angles) {
    return (struct ggml_ext_kv_cold) {
        .p      = *p,
        .block  = ggml_ext_kv_cold_block_of(dk, dv, p->channels, false),
        .layout = ggml_ext_kv_books_of(dk, dv, p->channels),
        .dk     = dk,
        .dv     = dv,
        .pool   = pool,
        .books  = books,
        .angles = angles,
    };
}

#define MOST_PAIRS 512

// Loops without a branch, which compilers vectorise.
static inline void cold_turn(int n, int step, int other, const float * c, const float * s, float * x) {
    for (int i = 0; i < n; i++) {
        const float x0 = x[i * step], x1 = x[i * step + other];
        x[i * step]         = x0 * c[i] - x1 * s[i];
        x[i * step + other] = x0 * s[i] + x1 * c[i];
    }
}

void ggml_ext_kv_cold_turn(const struct ggml_ext_kv_cold * cold, int32_t position, bool back, float * x) {
    const int n = cold->p.n_rot / 2;
    if (n == 0) {
        return;
    }
    const int64_t turn = GGML_EXT_KV_TURN + position / GGML_EXT_KV_TURN;
    GGML_ASSERT(position >= 0 && turn < 2 * GGML_EXT_KV_TURN && "ggml-ext: a position beyond the angles");
    const float * a      = (const float *) cold->angles->data + (position % GGML_EXT_KV_TURN) * cold->p.n_rot;
    const float * b      = (const float *) cold->angles->data + turn * cold->p.n_rot;
    const float   length = back ? 1.0f / cold->p.length : cold->p.length;
    const float   sign   = back ? -length : length;
    float         c[MOST_PAIRS], s[MOST_PAIRS];
    for (int i = 0; i < n; i++) {
        c[i] = (a[i] * b[i] - a[n + i] * b[n + i]) * length;
        s[i] = (a[n + i] * b[i] + a[i] * b[n + i]) * sign;
    }
    if (cold->p.neox) {
        cold_turn(n, 1, n, c, s, x);
    } else {
        cold_turn(n, 2, 1, c, s, x);
    }
}

static const char * cold_books(const struct ggml_ext_kv_cold * cold, int64_t head) {
    return (const char *) cold->books->data + head * cold->books->nb[1];
}

// Of a run of slots, one place after the other. c: channels of a code, a constant wherever these are called.
static inline void cold_values(int c, const struct ggml_ext_kv_cold * cold, const char * books, const uint8_t * codes,
                               int count, char * rows) {
    const float *  scale = (const float *) (books + cold->layout.v_scale);
    const int8_t * words = (const int8_t *) (books + cold->layout.v);
    const int      n     = cold->dv / QK8_0;  // blocks of a row
    block_q8_0 *   out   = (block_q8_0 *) rows;
    for (int b = 0; b < n; b++) {
        const ggml_fp16_t d = GGML_CPU_FP32_TO_FP16(scale[b * QK8_0 / c]);
        for (int t = 0; t < count; t++) {
            out[t * n + b].d = d;
        }
    }
    for (int place = 0; place < cold->dv / c; place++, words += GGML_EXT_KV_WORDS * c) {
        block_q8_0 * block = out + place * c / QK8_0;
        const int    at    = place * c % QK8_0;
        for (int t = 0; t < count; t++) {
            memcpy(block[t * n].qs + at, words + codes[t * cold->block.v_row + place] * c, c);
        }
    }
}

// q: room for the words' integers.
static inline void cold_keys(int c, const struct ggml_ext_kv_cold * cold, const char * books, const uint8_t * codes,
                             int count, int8_t * q, float * x) {
    const int8_t * words = (const int8_t *) (books + cold->layout.k);
    float          scale[2 * MOST_PAIRS];
    for (int place = 0; place < cold->dk / c; place++, words += GGML_EXT_KV_WORDS * c) {
        for (int i = 0; i < c; i++) {
            scale[place * c + i] = ((const float *) books)[place];
        }
        for (int t = 0; t < count; t++) {
            memcpy(q + t * cold->dk + place * c, words + codes[t * cold->block.k_row + place] * c, c);
        }
    }
    for (int t = 0; t < count; t++) {
        const int8_t * from = q + t * cold->dk;
        float *        to   = x + t * cold->dk;
        for (int i = 0; i < cold->dk; i++) {
            to[i] = scale[i] * from[i];
        }
    }
}

void ggml_ext_kv_cold_decode(const struct ggml_ext_kv_cold * cold, int64_t head, const char * block, int begin,
                             int count, float * x, char * k, char * v) {
    const char *    books     = cold_books(cold, head);
    const int32_t * positions = (const int32_t *) block + begin;
    const uint8_t * of_k      = (const uint8_t *) block + cold->block.k + begin * cold->block.k_row;
    const uint8_t * of_v      = (const uint8_t *) block + cold->block.v + begin * cold->block.v_row;
    if (cold->p.channels == 4) {
        cold_keys(4, cold, books, of_k, count, (int8_t *) k, x);
        cold_values(4, cold, books, of_v, count, v);
    } else {
        cold_keys(8, cold, books, of_k, count, (int8_t *) k, x);
        cold_values(8, cold, books, of_v, count, v);
    }
    for (int t = 0; t < count; t++) {
        ggml_ext_kv_cold_turn(cold, positions[t], false, x + (size_t) t * cold->dk);
    }
    // In the place of the words. Rows are adjacent and whole blocks long.
    ggml_get_type_traits_cpu(GGML_TYPE_Q8_0)->from_float(x, k, (int64_t) count * cold->dk);
}
