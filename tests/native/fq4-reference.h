// FQ4 weights and int8 activations as docs/gguf.md and fq4/cpu/fq4.h word them, written anew for the tests.

#pragma once

#include "fq4/fq4.h"
#include "ggml.h"

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

namespace fq4_reference {

constexpr int    BLOCK       = 256;
constexpr size_t BLOCK_BYTES = 138;

// Rows of whole blocks as scale times integer: weights with the scales of fp16, or activations.
struct Rows {
    int64_t             n_blocks;  // of a row
    std::vector<double> d;         // of a block
    std::vector<int8_t> q;         // 256 of a block
};

inline void decode(const uint8_t * block, double & d, int8_t * q) {
    ggml_fp16_t half;
    std::memcpy(&half, block, 2);
    d = ggml_fp16_to_fp32(half);
    for (int i = 0; i < BLOCK; i++) {
        const int row_byte = block[2 + i / 32], code_byte = block[10 + i / 128 * 64 + i % 64];
        const int row  = i / 16 % 2 ? row_byte / 16 : row_byte % 16;
        const int code = i % 128 >= 64 ? code_byte / 16 : code_byte % 16;
        q[i]           = ggml_ext_fq4_table[row][code];
    }
}

// d is what a float holds: 1 / (127 / max). NaN for a block with a NaN or an infinite number.
inline void round_activations(const float * x, double & d, int8_t * q) {
    float max    = 0.0f;
    bool  finite = true;
    for (int i = 0; i < BLOCK; i++) {
        finite = finite && std::isfinite(x[i]);
        max    = std::fmax(max, std::fabs(x[i]));
    }
    const float scale = 127.0f / max;
    const bool  zero  = !finite || !(scale <= FLT_MAX);
    d                 = !finite ? NAN : zero ? 0.0 : 1.0f / scale;
    for (int i = 0; i < BLOCK; i++) {
        const float scaled = x[i] * scale;
        q[i]               = zero ? 0 : (int8_t) std::nearbyint((double) scaled);  // ties to even
    }
}

struct Product {
    double value;
    double norm;  // the same with magnitudes of all summands
};

inline Product multiply(const Rows & a, int64_t row, const Rows & b, int64_t column) {
    Product p = { 0, 0 };
    for (int64_t ib = 0; ib < a.n_blocks; ib++) {
        const int64_t  ia = row * a.n_blocks + ib, ic = column * b.n_blocks + ib;
        const int8_t * w   = a.q.data() + ia * BLOCK;
        const int8_t * y   = b.q.data() + ic * BLOCK;
        int32_t        sum = 0, magnitude = 0;
        for (int i = 0; i < BLOCK; i++) {
            sum += w[i] * y[i];
            magnitude += std::abs(w[i] * y[i]);
        }
        p.value += a.d[ia] * b.d[ic] * sum;
        p.norm += std::fabs(a.d[ia] * b.d[ic]) * magnitude;
    }
    return p;
}

// How far a float sum may be off: the product of the scales, its product with an exact integer, a chain of n_blocks
// additions and a tree of 16 lanes round each summand at most 2 + n_blocks + 4 times; one more for second order.
inline double bound(int64_t n_blocks, double norm) {
    return (double) (n_blocks + 7) * std::ldexp(norm, -24);
}

// Bytes of any FQ4 block are valid: every row index and code is in the table.
inline void random_block(std::mt19937 & rng, float d, uint8_t * block) {
    for (size_t i = 2; i < BLOCK_BYTES; i++) {
        block[i] = (uint8_t) rng();
    }
    const ggml_fp16_t half = ggml_fp32_to_fp16(d);
    std::memcpy(block, &half, 2);
}

}  // namespace fq4_reference
