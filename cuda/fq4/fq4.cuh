// FQ4 blocks in device code: the table and its look-up. ggml_ext/fq4/fq4.h has the layout of a block.
//
// A block is 138 bytes, so every second one starts at an odd multiple of 2: words of it are read as two halves
// (ggml_ext_fq4_word), or through shared memory.

#pragma once

#include "common/device.cuh"
#include "fq4/table.h"

#define GGML_EXT_FQ4_BLOCK_BYTES 138
#define GGML_EXT_FQ4_S           2   // offset of s[8]
#define GGML_EXT_FQ4_Q           10  // offset of q[128]

namespace ggml_ext {

#define GGML_EXT_FQ4_SAME(t)   t
#define GGML_EXT_FQ4_VALUES(s) GGML_EXT_FQ4_ROW_##s(GGML_EXT_FQ4_SAME)
// T[s][q] at 16 s + q.
[[maybe_unused]] static const __device__ __align__(16) int8_t fq4_values[256] = {
    GGML_EXT_FQ4_VALUES(0),  GGML_EXT_FQ4_VALUES(1),  GGML_EXT_FQ4_VALUES(2),  GGML_EXT_FQ4_VALUES(3),
    GGML_EXT_FQ4_VALUES(4),  GGML_EXT_FQ4_VALUES(5),  GGML_EXT_FQ4_VALUES(6),  GGML_EXT_FQ4_VALUES(7),
    GGML_EXT_FQ4_VALUES(8),  GGML_EXT_FQ4_VALUES(9),  GGML_EXT_FQ4_VALUES(10), GGML_EXT_FQ4_VALUES(11),
    GGML_EXT_FQ4_VALUES(12), GGML_EXT_FQ4_VALUES(13), GGML_EXT_FQ4_VALUES(14), GGML_EXT_FQ4_VALUES(15),
};

// Copies the table to shared memory, row s to rows[s]; threads 0-15 of a one-dimensional block do it. Needs a barrier after.
__device__ __forceinline__ void fq4_load_table(uint4 (&rows)[16]) {
    if (threadIdx.x < 16) {
        rows[threadIdx.x] = reinterpret_cast<const uint4 *>(fq4_values)[threadIdx.x];
    }
}

// Look-up of four codes, c_i in bits 4 i .. 4 i + 3 of `codes` (bits 16 and up are ignored), in one row of the table:
// byte i of the result is T[s][c_i].
__device__ __forceinline__ uint32_t fq4_lookup(uint4 row, uint32_t codes) {
    const uint32_t low    = __byte_perm(row.x, row.y, codes & 0x7777);  // as if all c_i < 8
    const uint32_t high   = __byte_perm(row.z, row.w, codes & 0x7777);  // as if all c_i >= 8
    const uint32_t choice = 0x3210 | (codes >> 1 & 0x4444);
    return __byte_perm(low, high, choice);
}

// Four bytes of q hold eight codes. Moves those of the low nibbles to bits 0-15 and those of the high nibbles to bits
// 16-31, byte 0's first.
__device__ __forceinline__ uint32_t fq4_split(uint32_t q) {
    const uint32_t low  = q & 0x0f0f0f0f;
    const uint32_t high = q >> 4 & 0x0f0f0f0f;
    return __byte_perm(low | low >> 4, high | high >> 4, 0x6420);
}

// A word of four bytes at an address that is a multiple of 2.
__device__ __forceinline__ uint32_t fq4_word(const void * p) {
    const uint16_t * halves = static_cast<const uint16_t *>(p);
    return halves[0] | uint32_t(halves[1]) << 16;
}

}  // namespace ggml_ext
