// Blocks from shared memory to operands of mma_s8, in registers: each weight is decoded once, by the lane whose
// fragment it belongs to.
//
// The order of k inside a product is free as long as both operands agree. Lane (g, t) = (lane / 4, lane % 4) takes, of
// block row g, the whole sub-blocks 4 i + t, i = 0..3: one table row and 16 contiguous codes each, and the activations
// 64 i + 16 t .. + 15 of column g, one load of 16 bytes. Of these 16, words 0 and 1 are the registers of one mma, 2 and
// 3 those of the next. In an FQ4_64 block, whose runs are half as long, it takes the 8 codes of each run in bytes 8 t .. 8 t + 7
// of q, those of the low nibbles for one mma, those of the high ones for the next, and the activations 8 t .. + 7 and
// 32 + 8 t .. + 7.

#pragma once

#include "common/device.cuh"
#include "fq4.cuh"

namespace ggml_ext {

// A warp's 32 rows of one block, as copied: row r from word fq4_raw_row(r) on, from the aligned word that holds its first
// byte, 35 words, or of an FQ4_64 block 9 or 10. FQ4: the words that eight rows' lanes read at a time lie in 32 different
// banks (row r at bank 4 r - r % 4 + 4 t) where all rows are aligned alike. FQ4_64: an odd distance keeps most of them apart.
template <typename L> __device__ __forceinline__ int fq4_raw_row(int r) {
    return L::weights == 256 ? 36 * r - r % 4 : 11 * r;
}

// Eight bytes q0, q1 hold 16 codes: those of the low nibbles are looked up in `low`, those of the high ones in `high`.
// 27 instructions: fewer than four fq4_lookup, since two registers of codes are split and masked at once, and the
// choice between the table's halves is one logical operation.
__device__ __forceinline__ void fq4_decode16(uint32_t q0, uint32_t q1, uint4 low, uint4 high, uint32_t (&from_low)[2],
                                             uint32_t (&from_high)[2]) {
    const uint32_t even = __byte_perm(q0, q1, 0x6420), odd = __byte_perm(q0, q1, 0x7531);
    const uint32_t even_up = even << 4, odd_up = odd << 4;
    // Nibble j of each: code j. Bit 3 is left out: it chooses the half of the row below.
    const uint32_t codes_low  = ((even & 0x0f0f0f0f) | (odd_up & 0xf0f0f0f0)) & 0x77777777;
    const uint32_t codes_high = ((even >> 4 & 0x0f0f0f0f) | (odd & 0xf0f0f0f0)) & 0x77777777;
    // Bit 3 of code j as a byte: signs of bytes 0, 4, 1, 5 and 2, 6, 3, 7.
    from_low[0]               = fq4_select(low, codes_low, permute_bytes(even_up, odd_up, 0xd9c8));
    from_low[1]               = fq4_select(low, codes_low >> 16, permute_bytes(even_up, odd_up, 0xfbea));
    from_high[0]              = fq4_select(high, codes_high, permute_bytes(even, odd, 0xd9c8));
    from_high[1]              = fq4_select(high, codes_high >> 16, permute_bytes(even, odd, 0xfbea));
}

// Rows 16 i + g and 16 i + 8 + g, i = 0, 1, of a warp's block: operands and scales.
template <typename L> struct fq4_fragments {
    uint32_t a[2][L::weights / 64][2][4];  // [16 rows][64 k][mma]
    float    d[2][2];                      // [16 rows][row g or g + 8]
};

// Byte 2 i + j of `starts`: at which byte of its first word the block in row 16 i + 8 j + g starts.
__device__ __forceinline__ void fq4_decode(fq4_fragments<fq4_layout> & f, const uint32_t * raw,
                                           const fq4_spread & table, unsigned starts) {
    const int    g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const char * own_table = reinterpret_cast<const char *>(&table[0][threadIdx.x % FQ4_COPIES]);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        __syncwarp();  // keeps the compiler from loading both halves' codes at once: it spills registers then
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int        is_odd = starts >> (8 * (2 * i + j) + 1) & 1;
            const uint32_t * words  = raw + fq4_raw_row<fq4_layout>(g) + 36 * (16 * i + 8 * j);
            f.d[i][j]               = __half2float(reinterpret_cast<const half *>(words)[is_odd]);
            // What follows d, s[8] and q[128], starts at the upper half of word 0 or the lower of word 1.
            const int        shift  = is_odd ? 0 : 16;
            const uint32_t * after  = words + is_odd;
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const uint32_t s   = __funnelshift_r(after[h], after[h + 1], shift) >> 4 * t;
                const uint4    low = *reinterpret_cast<const uint4 *>(own_table + (s << 7 & 0x780));
                const uint4    top = *reinterpret_cast<const uint4 *>(own_table + (s >> 9 & 0x780));
                uint32_t       q[5];
#pragma unroll
                for (int w = 0; w < 5; w++) {
                    q[w] = after[2 + 16 * h + 4 * t + w];
                }
#pragma unroll
                for (int half_mma = 0; half_mma < 2; half_mma++) {
                    uint32_t from_low[2], from_high[2];
                    fq4_decode16(__funnelshift_r(q[2 * half_mma], q[2 * half_mma + 1], shift),
                                 __funnelshift_r(q[2 * half_mma + 1], q[2 * half_mma + 2], shift), low, top, from_low,
                                 from_high);
#pragma unroll
                    for (int w = 0; w < 2; w++) {
                        f.a[i][2 * h][half_mma][2 * w + j]     = from_low[w];
                        f.a[i][2 * h + 1][half_mma][2 * w + j] = from_high[w];
                    }
                }
            }
        }
    }
}

__device__ __forceinline__ void fq4_decode(fq4_fragments<fq4_64_layout> & f, const uint32_t * raw,
                                           const fq4_spread & table, unsigned starts) {
    const int    g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const char * own_table = reinterpret_cast<const char *>(&table[0][threadIdx.x % FQ4_COPIES]);
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int        start = starts >> 8 * (2 * i + j) & 3;
            const uint32_t * words = raw + fq4_raw_row<fq4_64_layout>(16 * i + 8 * j + g);
            const uint32_t   head  = __funnelshift_r(words[0], words[1], 8 * start);  // d, s[0], s[1], q[0]
            f.d[i][j]              = fq4_64_layout::scale_of(head & 0xff);
            // Sub-blocks t / 2 and 2 + t / 2.
            const uint32_t   s     = head >> (8 + t / 2 * 4);
            const uint4      low   = *reinterpret_cast<const uint4 *>(own_table + (s << 7 & 0x780));
            const uint4      high  = *reinterpret_cast<const uint4 *>(own_table + (s >> 1 & 0x780));
            // q starts at byte 3 + start.
            const uint32_t * q     = words + 2 * t + (start > 0);
            const int        shift = 8 * ((start + 3) % 4);
            uint32_t         from_low[2], from_high[2];
            fq4_decode16(__funnelshift_r(q[0], q[1], shift), __funnelshift_r(q[1], q[2], shift), low, high, from_low,
                         from_high);
#pragma unroll
            for (int w = 0; w < 2; w++) {
                f.a[i][0][0][2 * w + j] = from_low[w];
                f.a[i][0][1][2 * w + j] = from_high[w];
            }
        }
    }
}

}  // namespace ggml_ext
