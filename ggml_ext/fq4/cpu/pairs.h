// Pairs of FQ4 table rows for the SIMD look-ups: the byte s[i] of a block names the rows of the sub-blocks 2 i (low
// nibble) and 2 i + 1 (high nibble), so it indexes the 32 bytes that a vpshufb wants for those 32 weights.

#ifndef GGML_EXT_FQ4_PAIRS_CPU_H
#define GGML_EXT_FQ4_PAIRS_CPU_H

#include <stdint.h>

// [low + 16 high]: T[low][0 .. 15] + 128, T[high][0 .. 15] + 128. 64-byte aligned, 8 KiB.
extern const uint8_t ggml_ext_fq4_pairs[256][32];

#endif  // GGML_EXT_FQ4_PAIRS_CPU_H
