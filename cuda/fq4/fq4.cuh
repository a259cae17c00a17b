// Blocks of FQ4 and FQ4_64 in device code: their layouts, the table and its look-up. ggml_ext/fq4/fq4.h and
// fq4_64/fq4_64.h have the layouts in full.
//
// A block is 138 or 35 bytes, so it starts at a multiple of 2, or anywhere: words of it are put together from parts
// (word()), or shifted after a way through shared memory.
//
// Kernels are templates over the layout, L. A part of a block is 16 bytes of q: their low nibbles are one sub-block, their
// high ones the sub-block `run` weights on.

#pragma once

#include "common/device.cuh"
#include "fq4/table.h"

namespace ggml_ext {

struct fq4_layout {
    static constexpr int weights   = 256;
    static constexpr int bytes     = 138;
    static constexpr int alignment = 2;   // of a block
    static constexpr int run       = 64;  // weights in the low nibbles of consecutive bytes
    static constexpr int s         = 2;   // offset of s[8]
    static constexpr int q         = 10;  // offset of q[128]

    static __device__ __forceinline__ float scale(const char * block) {
        return __half2float(*reinterpret_cast<const half *>(block));
    }

    // A word of four bytes at an address that is a multiple of 2.
    static __device__ __forceinline__ uint32_t word(const char * p) {
        const uint16_t * halves = reinterpret_cast<const uint16_t *>(p);
        return halves[0] | uint32_t(halves[1]) << 16;
    }
};

struct fq4_64_layout {
    static constexpr int weights   = 64;
    static constexpr int bytes     = 35;
    static constexpr int alignment = 1;
    static constexpr int run       = 32;
    static constexpr int s         = 1;  // offset of s[2]
    static constexpr int q         = 3;  // offset of q[32]

    // The scale of a block whose first byte is d. 1 .. 254 are bits 20-27 of consecutive floats, from 1.125 2^-24 on.
    static __device__ __forceinline__ float scale_of(uint32_t d) {
        const float value = __uint_as_float((d + ((127 - 24) << 3)) << 20);
        return d == 0 ? 0.0f : d == 255 ? __uint_as_float(0x7fc00000) : value;
    }

    static __device__ __forceinline__ float scale(const char * block) {
        return scale_of(*reinterpret_cast<const uint8_t *>(block));
    }

    // A word of four bytes at any address.
    static __device__ __forceinline__ uint32_t word(const char * p) {
        const uint8_t * b = reinterpret_cast<const uint8_t *>(p);
        return b[0] | uint32_t(b[1]) << 8 | uint32_t(b[2]) << 16 | uint32_t(b[3]) << 24;
    }
};

// The first weight of a part's low nibbles.
template <typename L> __device__ __forceinline__ int fq4_first_weight(int part) {
    constexpr int parts = L::run / 16;  // of two runs
    return part / parts * (2 * L::run) + part % parts * 16;
}

// The table's row of sub-block `sub`.
template <typename L> __device__ __forceinline__ int fq4_row_of(const char * block, int sub) {
    return reinterpret_cast<const uint8_t *>(block)[L::s + sub / 2] >> (sub % 2 * 4) & 15;
}

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
}  // namespace ggml_ext
