// Pairs of table rows for the SIMD look-ups: the byte s[i] of a block names the rows of the sub-blocks 2 i (low
// nibble) and 2 i + 1 (high nibble), so it indexes the 32 bytes that a vpshufb wants for those 32 weights.

#ifndef GGML_EXT_FQ4_PAIRS_CPU_H
#define GGML_EXT_FQ4_PAIRS_CPU_H

#include <stdint.h>

// [low + 16 high]: T[low][0 .. 15] + 128, T[high][0 .. 15] + 128. 64-byte aligned, 8 KiB.
extern const uint8_t ggml_ext_fq4_pairs[256][32];

// The same of FQ3's table, every row twice: bit 3 of a code does not matter.
extern const uint8_t ggml_ext_fq3_pairs[256][32];

// All pair(low, high) in this order.
// clang-format off
#define GGML_EXT_FQ4_PAIRS(pair)                                                                    \
    GGML_EXT_FQ4_PAIRS_OF(pair, 0),  GGML_EXT_FQ4_PAIRS_OF(pair, 1),  GGML_EXT_FQ4_PAIRS_OF(pair, 2),  \
    GGML_EXT_FQ4_PAIRS_OF(pair, 3),  GGML_EXT_FQ4_PAIRS_OF(pair, 4),  GGML_EXT_FQ4_PAIRS_OF(pair, 5),  \
    GGML_EXT_FQ4_PAIRS_OF(pair, 6),  GGML_EXT_FQ4_PAIRS_OF(pair, 7),  GGML_EXT_FQ4_PAIRS_OF(pair, 8),  \
    GGML_EXT_FQ4_PAIRS_OF(pair, 9),  GGML_EXT_FQ4_PAIRS_OF(pair, 10), GGML_EXT_FQ4_PAIRS_OF(pair, 11), \
    GGML_EXT_FQ4_PAIRS_OF(pair, 12), GGML_EXT_FQ4_PAIRS_OF(pair, 13), GGML_EXT_FQ4_PAIRS_OF(pair, 14), \
    GGML_EXT_FQ4_PAIRS_OF(pair, 15)
#define GGML_EXT_FQ4_PAIRS_OF(pair, high)                                    \
    pair(0, high),  pair(1, high),  pair(2, high),  pair(3, high),           \
    pair(4, high),  pair(5, high),  pair(6, high),  pair(7, high),           \
    pair(8, high),  pair(9, high),  pair(10, high), pair(11, high),          \
    pair(12, high), pair(13, high), pair(14, high), pair(15, high)
// clang-format on

#endif  // GGML_EXT_FQ4_PAIRS_CPU_H
