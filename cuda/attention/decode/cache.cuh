// Rows of a q8_0 or q4_0 cache in shared memory: copied as they are, decoded word by word.
//
// A block of 32 channels is an f16 scale and 8 (q8_0) or 4 (q4_0) words of codes: 34 or 18 bytes. Thus a row's even
// blocks have the scale in front of two codes in one word, and their last word of codes ends with the next block's
// scale:
//     | d  c0 c1 | c2 .. c5 | ... | c30 c31  d' | c'0 .. c'3 | ...
// Where rows begin at whole words, which a head of 96 channels does not grant, no word is put together except the last
// of an even block, of c0 c1 and c30 c31. The order of channels is then that of code_channel; it is Q's and the
// result's to follow it.

#pragma once

#include "common/device.cuh"
#include "shape.h"

namespace ggml_ext {

template <cache_type TYPE, int DIM> struct cache_row {
    static constexpr cache_type type        = TYPE;
    static constexpr int        dim         = DIM;
    static constexpr int        block_bytes = cache_block_bytes(TYPE);
    static constexpr int        words       = (block_bytes - 2) / 4;  // of codes per block
    static constexpr int        bytes       = cache_row_bytes(TYPE, DIM);
    static constexpr int        align       = cache_row_align(TYPE, DIM);
    static constexpr int        spans       = cache_row_spans(TYPE, DIM);
    static constexpr int        stride      = cache_row_stride(TYPE, DIM);
    static constexpr bool       whole_words = align >= 4;
};

// A warp's copies of decode_step rows to shared memory. A row lies there as far from a multiple of 16 as in the cache.
// `lanes` lanes share a row, so that a warp copies 16 bytes each of 32 / lanes rows at once; where that leaves the last
// span of the rows, one copy more takes it. `lanes` is such that all rows of a lane begin alike, as far from a multiple
// of 16.
template <class Row> struct cache_copies {
    static constexpr int  lanes = Row::spans >= 16 ? 16 : Row::spans >= 9 ? 8 : Row::spans >= 4 ? 4 : 2;
    static constexpr int  rows  = 32 / lanes;  // at once
    static constexpr int  sets  = Row::spans / lanes;
    static constexpr bool rest  = Row::spans % lanes != 0;
    static_assert(Row::spans % lanes <= 1 && rows * Row::align % 16 == 0 && decode_step % rows == 0,
                  "spans of every row are copied, and rows of a lane begin alike");

    const char * global;               // of this lane, in the warp's next step
    const char * global_rest;
    int          shared, shared_rest;  // offsets in the stage

    __device__ __forceinline__ cache_copies(const char * first, int64_t nb1, int lane) {
        const auto place = [&](int row, int span, const char *& from, int & to) {
            from = first + row * nb1 - misaligned(first, row * nb1) + 16 * span;
            to   = row * Row::stride + 16 * span;
        };
        place(lane / lanes, lane % lanes, global, shared);
        place(lane % decode_step, Row::spans - 1, global_rest, shared_rest);
    }

    // How far a row begins behind a multiple of 16.
    static __device__ __forceinline__ int misaligned(const char * first, int64_t row) {
        return Row::align == 16 ? 0 : int(reinterpret_cast<uintptr_t>(first + row) % 16);
    }

    // All rows. Reads less than 32 bytes behind a row too, which belong to the cache where it has a next token.
    __device__ __forceinline__ void issue(char * stage, int64_t nb1, int lane) const {
#pragma unroll
        for (int row = 0; row < decode_step; row += rows) {
#pragma unroll
            for (int set = 0; set < sets; set++) {
                cp_async_part(stage + shared + row * Row::stride + 16 * set * lanes,
                              global + row * nb1 + 16 * set * lanes, 16);
            }
        }
        if (rest && lane < decode_step) {
            cp_async_part(stage + shared_rest, global_rest, 16);
        }
    }

    // The first n_rows, and not a byte more; the others become zeros. first: of the step.
    static __device__ __forceinline__ void issue_last(char * stage, const char * first, int64_t nb1, int n_rows,
                                                      int lane) {
#pragma unroll 1
        for (int i = lane; i < decode_step * Row::spans; i += 32) {
            const int row = i / Row::spans, span = i % Row::spans;
            const int begin = 16 * span - misaligned(first, row * nb1);
            const int n     = row < n_rows ? max(0, min(16, Row::bytes - begin)) : 0;
            cp_async_part(stage + row * Row::stride + 16 * span, first + row * nb1 + begin, n);
        }
    }

    __device__ __forceinline__ void advance(int64_t bytes) {
        global += bytes;
        global_rest += bytes;
    }
};

// The word in which block `block` begins, or with which the block before it ends.
template <class Row> const __device__ __forceinline__ uint32_t * cache_block_words(const char * row, int block) {
    return reinterpret_cast<const uint32_t *>(row) + block / 2 * (2 * Row::words + 1) + block % 2 * Row::words;
}

// Word i of the codes of a block.
template <class Row> __device__ __forceinline__ uint32_t cache_codes(const char * row, int block, int i) {
    if constexpr (Row::whole_words) {
        const uint32_t * word = cache_block_words<Row>(row, block);
        return block % 2 ? word[1 + i] : __byte_perm(word[0], word[1 + i], i == Row::words - 1 ? 0x5432 : 0x7654);
    } else {
        const char *     codes = row + block * Row::block_bytes + 2 + 4 * i;
        const int        half  = int(reinterpret_cast<uintptr_t>(codes) & 2);
        const uint32_t * word  = reinterpret_cast<const uint32_t *>(codes - half);
        return __byte_perm(word[0], word[1], half ? 0x5432 : 0x3210);
    }
}

// A word with its scale, in the high half where scale_is_high.
template <class Row> __device__ __forceinline__ uint32_t cache_scale(const char * row, int block) {
    if constexpr (Row::whole_words) {
        return *cache_block_words<Row>(row, block);
    } else {
        return *reinterpret_cast<const uint16_t *>(row + block * Row::block_bytes);
    }
}
template <class Row> __device__ __forceinline__ bool scale_is_high(int block) {
    return Row::whole_words && block % 2;
}

// The channel of its byte `byte` of word i; of q4_0 that of the low nibble, 16 below the high one's.
template <class Row> __device__ __forceinline__ int code_channel(int block, int i, int byte) {
    if (!Row::whole_words || block % 2) {
        return 4 * i + byte;
    }
    if (i == Row::words - 1) {
        return byte < 2 ? byte : 4 * i + byte;
    }
    return 2 + 4 * i + byte;
}

__device__ __forceinline__ half2 bits_to_half2(uint32_t bits) {
    half2 h;
    memcpy(&h, &bits, sizeof(h));
    return h;
}

__device__ __forceinline__ uint32_t half2_bits(half2 h) {
    uint32_t bits;
    memcpy(&bits, &h, sizeof(bits));
    return bits;
}

template <class Row> __device__ __forceinline__ float cache_scale_float(const char * row, int block) {
    const half2 word = bits_to_half2(cache_scale<Row>(row, block));
    return scale_is_high<Row>(block) ? __high2float(word) : __low2float(word);
}

// The scales of a block of two tokens.
template <class Row> __device__ __forceinline__ half2 cache_scales(const char * a, const char * b, int block) {
    return bits_to_half2(__byte_perm(cache_scale<Row>(a, block), cache_scale<Row>(b, block),
                                     scale_is_high<Row>(block) ? 0x7632 : 0x5410));
}

// Two tokens' words of codes of the same four channels become four pairs (token a, token b) of f16 with their scales.
// Exact up to the product: 0x6400 | n is 1024 + n. nibble: of q4_0, 0 or 4.
template <class Row>
__device__ __forceinline__ void cache_decode(uint32_t (&pairs)[4], uint32_t a, uint32_t b, half2 scales, int nibble) {
    constexpr bool q8 = Row::type == CACHE_Q8_0;
    a                 = q8 ? a ^ 0x80808080u : a >> nibble & 0x0f0f0f0fu;
    b                 = q8 ? b ^ 0x80808080u : b >> nibble & 0x0f0f0f0fu;
    const half2 zero  = __float2half2_rn(q8 ? -1152.0f : -1032.0f);
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const uint32_t both = __byte_perm(a, b, i ? 0x7362 : 0x5140);  // a_i, b_i, a_i+1, b_i+1
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const uint32_t codes = __byte_perm(both, 0x64646464u, j ? 0x4342 : 0x4140);
            pairs[i + j]         = half2_bits(__hmul2(__hadd2(bits_to_half2(codes), zero), scales));
        }
    }
}

}  // namespace ggml_ext
