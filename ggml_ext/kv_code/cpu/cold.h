// Rows and coupled codes, one head at a time.

#ifndef GGML_EXT_KV_COLD_CPU_H
#define GGML_EXT_KV_COLD_CPU_H

#include "ggml.h"
#include "kv_code/cold.h"

// A layer's codes: what its two sub-ops have in common.
struct ggml_ext_kv_cold {
    struct ggml_ext_kv_cold_params p;
    struct ggml_ext_kv_cold_block  block;
    struct ggml_ext_kv_books       layout;
    int                            dk, dv;
    const struct ggml_tensor *     pool;
    const struct ggml_tensor *     books;   // [bytes of a head, n_head_kv]
    const struct ggml_tensor *     angles;  // NULL: nothing turns
};

// pool, books, angles: as the sub-ops have them.
struct ggml_ext_kv_cold ggml_ext_kv_cold_of(const struct ggml_ext_kv_cold_params * p, int dk, int dv,
                                            const struct ggml_tensor * pool, const struct ggml_tensor * books,
                                            const struct ggml_tensor * angles);

// Turns key x [dk] by a position, or back. Aborts for a position beyond the angles.
void ggml_ext_kv_cold_turn(const struct ggml_ext_kv_cold * cold, int32_t position, bool back, float * x);

// Slots begin .. begin + count - 1 of a block of a head as q8_0 rows: keys turned by their positions. x: room for dk
// values of each.
void ggml_ext_kv_cold_decode(const struct ggml_ext_kv_cold * cold, int64_t head, const char * block, int begin,
                             int count, float * x, char * k, char * v);

#endif  // GGML_EXT_KV_COLD_CPU_H
