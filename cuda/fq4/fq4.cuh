// FQ4 blocks in device code: the table and its look-up. ggml_ext/fq4/fq4.h has the layout of a block.
//
// A block is 138 bytes, so every second one starts at an odd multiple of 2: words of it are read as two halves
// (ggml_ext_fq4_word), or through shared memory.

#pragma once

#include "common/device.cuh"
#include "fq4/table.h"

constexpr int GGML_EXT_FQ4_BLOCK_BYTES = 138;
constexpr int GGML_EXT_FQ4_S           = 2;   // offset of s[8]
constexpr int GGML_EXT_FQ4_Q           = 10;  // offset of q[128]

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

// The table as FQ4_COPIES copies, lane l reading copy l % 8: no two lanes of a quarter-warp, which is what a load of 16
// bytes takes at a time, share a bank.
constexpr int FQ4_COPIES = 8;
using fq4_spread         = uint4[16][FQ4_COPIES];

// By thread `thread` of 128; needs a barrier after. MAGNITUDES: bytes 0-7 of a row are -T[s][q].
template <bool MAGNITUDES = false> __device__ __forceinline__ void fq4_spread_table(fq4_spread & rows, int thread) {
    uint4 row = reinterpret_cast<const uint4 *>(fq4_values)[thread / FQ4_COPIES];
    if (MAGNITUDES) {
        // -x = ~x + 1, and no byte carries: x is 0x81 or more.
        row.x = ~row.x + 0x01010101;
        row.y = ~row.y + 0x01010101;
    }
    rows[thread / FQ4_COPIES][thread % FQ4_COPIES] = row;
}

// Byte i: the table row's value for code i, whose lower three bits are nibble i of `codes` (bit 3 is 0); byte i of
// `is_high` is 0xff where the code is 8 or more, else 0.
__device__ __forceinline__ uint32_t fq4_select(const uint4 & row, uint32_t codes, uint32_t is_high) {
    return select_bits(is_high, permute_bytes(row.z, row.w, codes), permute_bytes(row.x, row.y, codes));
}

// Byte i: the table row's value for code 4 half + i, where code j is nibble j of `codes`.
__device__ __forceinline__ uint32_t fq4_lookup(const uint4 & row, uint32_t codes, int half) {
    // Bit 3 of each code, eight times: bit 7 of the bytes of `codes` (odd codes) and of codes << 4 (even ones).
    const uint32_t is_high = permute_bytes(codes, codes << 4, half ? 0xbfae : 0x9d8c);
    return fq4_select(row, (codes & 0x77777777) >> 16 * half, is_high);
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
