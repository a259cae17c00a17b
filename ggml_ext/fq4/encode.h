// The search for scales, table rows and codes, shared by the encoders of the types whose weights are d * T[s][q]: T a
// table of 16 rows, of 16 values in FQ4 and FQ4_64, of 8 in FQ3 and FQ3_64. Every float operation is a single-precision one in
// the order written; encode's source is compiled without contraction.
//
// A block is n_subs sub-blocks of 16 weights, 16 n_subs weights in all.

#ifndef GGML_EXT_FQ4_ENCODE_H
#define GGML_EXT_FQ4_ENCODE_H

#include "fq4.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#define GGML_EXT_FQ4_N_CELLS 512

// A table's nearest codes and their values, by cell and row. Cell c holds t = w / d with
// c / 2 - 128 <= t < (c + 1) / 2 - 128: the midpoint of two int8 is a multiple of 1 / 2, so inside a cell the nearest value
// is constant. Before ggml_ext_fq4_nearest_fill there are the first two members alone.
struct ggml_ext_fq4_nearest {
    const int8_t * table;    // [16][n_codes], rows ascend
    int            n_codes;  // of a row
    atomic_bool    filled;
    _Alignas(64) float value[GGML_EXT_FQ4_N_CELLS][16];
    uint8_t code[GGML_EXT_FQ4_N_CELLS][16];
};

// Of FQ4's table.
extern struct ggml_ext_fq4_nearest ggml_ext_fq4_nearest;

// Fills what a table has on the first call. Thread-safe.
void ggml_ext_fq4_nearest_fill(struct ggml_ext_fq4_nearest * nearest);

// The best rows and cells that were found for a block. `cost` is the sum of weight * error^2; INFINITY before the first.
struct ggml_ext_fq4_choice {
    const struct ggml_ext_fq4_nearest * nearest;
    float                               d;
    float                               cost;
    uint8_t                             row[QK_FQ4 / QK_FQ4_SUB];
    int16_t                             cell[QK_FQ4];
};

// A type's encoder.
struct ggml_ext_fq4_encoder {
    struct ggml_ext_fq4_nearest * nearest;
    int                           block;       // weights
    size_t                        block_size;  // bytes
    // Finds the best d, rows and cells of a block; d stays 0 for weights that are too small for any scale. `best` comes with
    // d = 0 at infinite cost. False for a block that the type cannot hold.
    bool (*search)(const float * x, const float * weight, struct ggml_ext_fq4_choice * best);
    void (*pack)(const struct ggml_ext_fq4_choice * choice, void * block);
    // Makes a block of zeros one whose d is NaN, which ggml_validate_row_data reports.
    void (*refuse)(void * block);
};

// Encodes nrows rows, with the importance of each column (n_per_row values >= 0) or NULL. Returns the bytes written.
size_t ggml_ext_fq4_encode_rows(const struct ggml_ext_fq4_encoder * encoder, const float * src, void * dst,
                                int64_t nrows, int64_t n_per_row, const float * imatrix);

// Tries one d, which must be a value that the block can hold: keeps it if it beats the best so far. d = 0 is no
// candidate.
void ggml_ext_fq4_try(int n_subs, const float * x, const float * weight, float d, struct ggml_ext_fq4_choice * best);

// The d that minimises the weighted squared error for the chosen rows and codes; 0 if none does.
float ggml_ext_fq4_refit(int n_subs, const float * x, const float * weight, const struct ggml_ext_fq4_choice * choice);

// The largest magnitude of n weights; false for a NaN or a weight beyond `limit`.
bool ggml_ext_fq4_largest(int n, const float * x, float limit, float * largest);

// The search of the encoders for blocks of 256 weights with an fp16 scale.
bool ggml_ext_fq4_search(const float * x, const float * weight, struct ggml_ext_fq4_choice * best);

// The chosen code of weight i.
uint8_t ggml_ext_fq4_code(const struct ggml_ext_fq4_choice * choice, int i);

// The chosen rows of n_subs sub-blocks as nibbles, the even ones low.
void ggml_ext_fq4_pack_rows(const struct ggml_ext_fq4_choice * choice, int n_subs, uint8_t * s);

#endif  // GGML_EXT_FQ4_ENCODE_H
