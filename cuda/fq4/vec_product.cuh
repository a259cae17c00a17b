// The inner product of fq4_vec: 32 weights of one lane times up to 8 columns of int8 activations.
//
// A lane has 16 bytes of a block's q, four words v0 .. v3: their low nibbles are one sub-block, their high nibbles the
// sub-block a run of weights on. Two words give two registers of eight codes, one per sub-block, with a shift and a LOP3 each
// (fq4_vec_codes). Their nibbles are then in the order v0.0 v1.0 v0.1 v1.1 | v0.2 v1.2 v0.3 v1.3 (byte 0 of v0, of v1,
// ...), so the activations are brought into that order instead, once for all rows of the warp (fq4_vec_order).
//
// Look-up of four codes (the low half of a register): PRMT takes a 3-bit index per byte of the result; where bit 3 of
// the nibble is set it gives the sign of the indexed byte, eight times. Codes 0-7 are the negative values of every row
// and codes 8-15 the positive ones, so with the magnitudes of either half in a register pair, one PRMT by the codes
// gives the magnitude of the negative weights and 0 for the others, one by the codes with bit 3 flipped gives that of
// the positive ones. Each has its own DP4A, and the sums are subtracted at the end. That is 2 PRMT and 2 DP4A per four
// weights; picking one signed byte takes 5 instructions and 1 DP4A, which is less from three columns on. Integer logic
// and DP4A are different pipes of 16 lanes per clock and SM quarter.

#pragma once

#include "common/device.cuh"
#include "fq4.cuh"

namespace ggml_ext {

// Whether negative and positive weights are multiplied separately, as magnitudes.
__host__ __device__ constexpr bool fq4_vec_splits_by_sign(int n_cols) {
    return n_cols <= 2;
}

#define GGML_EXT_FQ4_SIGNS(s) fq4_row_signs({ GGML_EXT_FQ4_ROW_##s(GGML_EXT_FQ4_SAME) })

struct fq4_row_signs {
    int t[16];

    constexpr bool good() const {
        for (int i = 0; i < 16; i++) {
            if ((i < 8 ? -t[i] : t[i]) <= 0) {
                return false;
            }
        }
        return true;
    }
};

static_assert(GGML_EXT_FQ4_SIGNS(0).good() && GGML_EXT_FQ4_SIGNS(1).good() && GGML_EXT_FQ4_SIGNS(2).good() &&
                  GGML_EXT_FQ4_SIGNS(3).good() && GGML_EXT_FQ4_SIGNS(4).good() && GGML_EXT_FQ4_SIGNS(5).good() &&
                  GGML_EXT_FQ4_SIGNS(6).good() && GGML_EXT_FQ4_SIGNS(7).good() && GGML_EXT_FQ4_SIGNS(8).good() &&
                  GGML_EXT_FQ4_SIGNS(9).good() && GGML_EXT_FQ4_SIGNS(10).good() && GGML_EXT_FQ4_SIGNS(11).good() &&
                  GGML_EXT_FQ4_SIGNS(12).good() && GGML_EXT_FQ4_SIGNS(13).good() && GGML_EXT_FQ4_SIGNS(14).good() &&
                  GGML_EXT_FQ4_SIGNS(15).good(),
              "codes 0-7 are negative and codes 8-15 positive in every row");

struct fq4_vec_pair {
    uint32_t low, high;  // eight codes each, of the low and the high nibbles
};

__device__ __forceinline__ fq4_vec_pair fq4_vec_codes(uint32_t v0, uint32_t v1) {
    return { select_bits(0x0f0f0f0f, v0, v1 << 4), select_bits(0x0f0f0f0f, v0 >> 4, v1) };
}

// Sixteen activations of a sub-block in the order of the codes.
__device__ __forceinline__ void fq4_vec_order(uint4 y, uint32_t * ordered) {
    ordered[0] = __byte_perm(y.x, y.y, 0x5140);
    ordered[1] = __byte_perm(y.x, y.y, 0x7362);
    ordered[2] = __byte_perm(y.z, y.w, 0x5140);
    ordered[3] = __byte_perm(y.z, y.w, 0x7362);
}

// Sums over a lane's weights of one block, per column: `negative` is subtracted (0 where the weights keep their sign).
template <int N_COLS> struct fq4_vec_sums {
    int positive[N_COLS] = {};
    int negative[N_COLS] = {};

    // Eight codes of one table row times words `at` and `at` + 1 of each column.
    __device__ __forceinline__ void add(uint4 row, uint32_t codes, const uint32_t (&y)[N_COLS][8], int at) {
        if constexpr (fq4_vec_splits_by_sign(N_COLS)) {
            const uint32_t flipped = codes ^ 0x88888888;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint32_t below = permute_bytes(row.x, row.y, codes >> 16 * half);
                const uint32_t above = permute_bytes(row.z, row.w, flipped >> 16 * half);
#pragma unroll
                for (int c = 0; c < N_COLS; c++) {
                    negative[c] = __dp4a((int) below, (int) y[c][at + half], negative[c]);
                    positive[c] = __dp4a((int) above, (int) y[c][at + half], positive[c]);
                }
            }
        } else {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint32_t weights = fq4_lookup(row, codes, half);
#pragma unroll
                for (int c = 0; c < N_COLS; c++) {
                    positive[c] = __dp4a((int) weights, (int) y[c][at + half], positive[c]);
                }
            }
        }
    }

    __device__ __forceinline__ float value(int c) const {
        return float(fq4_vec_splits_by_sign(N_COLS) ? positive[c] - negative[c] : positive[c]);
    }
};

// What a lane needs to find its part of each of the adjacent blocks of an item: those of a block lie in adjacent lanes.
template <typename L> struct fq4_vec_lane {
    static constexpr int parts = L::weights / 32;  // of a block

    int block, part;
    int copy;    // of the table
    int first;   // weight of the part's low nibbles
    int to_row;  // factor that brings the nibble of its sub-block to bits 7-10

    __device__ __forceinline__ explicit fq4_vec_lane(int lane) :
        block(lane / parts), part(lane % parts), copy(lane % FQ4_COPIES), first(fq4_first_weight<L>(lane % parts)),
        to_row(lane % 2 ? 8 : 128) {}
};

// The four words of a lane's part of q. `blocks`: in shared memory, an item's blocks, which start `offset` (below 16)
// bytes on. Words are read from 4-byte addresses and shifted.
template <typename L>
__device__ __forceinline__ void fq4_vec_words(const char * blocks, int offset, const fq4_vec_lane<L> & lane,
                                              uint32_t (&v)[4]) {
    int      start;
    unsigned shift;
    if constexpr (L::alignment == 2) {
        // By 0, 2 or 4 bytes: the first block's part, at 10 + offset, is read from 8 + offset rounded up to a multiple
        // of 4. That way round (and with 5 words where 4 would do) the four blocks' words lie in different banks for
        // every offset.
        const int odd = offset & 2;
        start         = (L::bytes * lane.block & ~3) + 16 * lane.part + L::q - 2 + (offset + odd);
        shift         = 8 * ((L::bytes * lane.block & 3) + 2) - 8 * odd;
    } else {
        const int at = L::bytes * lane.block + 16 * lane.part + L::q + offset;
        start        = at & ~3;
        shift        = 8 * (at & 3);
    }
    const uint32_t * words = reinterpret_cast<const uint32_t *>(blocks + start);
    uint32_t         u[5];
#pragma unroll
    for (int i = 0; i < 5; i++) {
        u[i] = words[i];
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        v[i] = __funnelshift_rc(u[i], u[i + 1], shift);
    }
}

// Byte offset 128 s of table[s], s being the nibble of a byte that belongs to the lane's sub-blocks. A product, as
// multiply-adds have the pipe with room.
__device__ __forceinline__ uint32_t fq4_vec_row_offset(uint8_t nibbles, int to_row) {
    return nibbles * to_row & 0x780;
}

// acc[c] += this lane's share of the products of one weight row's block with the columns; scale[c]: the columns'.
template <typename L, int N_COLS>
__device__ __forceinline__ void fq4_vec_product(const char * blocks, int offset, const fq4_vec_lane<L> & lane,
                                                const fq4_spread & table, const uint32_t (&y)[N_COLS][8],
                                                const float (&scale)[N_COLS], float (&acc)[N_COLS]) {
    static_assert(sizeof(table[0]) == 128, "what fq4_vec_row_offset takes for granted");
    const char *    block = blocks + offset + L::bytes * lane.block;
    const uint8_t * s     = reinterpret_cast<const uint8_t *>(block) + L::s + lane.first / 32;
    const float     d     = L::scale(block);
    const char *    copy  = reinterpret_cast<const char *>(&table[0][lane.copy]);
    const uint4     low   = *reinterpret_cast<const uint4 *>(copy + fq4_vec_row_offset(s[0], lane.to_row));
    const uint4     high  = *reinterpret_cast<const uint4 *>(copy + fq4_vec_row_offset(s[L::run / 32], lane.to_row));
    uint32_t        v[4];
    fq4_vec_words(blocks, offset, lane, v);

    fq4_vec_sums<N_COLS> sums;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const fq4_vec_pair codes = fq4_vec_codes(v[2 * i], v[2 * i + 1]);
        sums.add(low, codes.low, y, 2 * i);
        sums.add(high, codes.high, y, 4 + 2 * i);
    }
#pragma unroll
    for (int c = 0; c < N_COLS; c++) {
        acc[c] += d * scale[c] * sums.value(c);
    }
}

}  // namespace ggml_ext
