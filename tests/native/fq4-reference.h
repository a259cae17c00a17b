// Weights and int8 activations as docs/gguf.md and fq4/cpu/fq4.h word them, written anew for the tests: FQ4's, with
// FQ4_REFERENCE_64 those of FQ4_64, with FQ4_REFERENCE_3 those of FQ3, with both those of FQ3_64.

#pragma once

#include "fq3/fq3.h"
#include "fq4/fq4.h"
#include "fq4_64/fq4_64.h"
#include "ggml.h"

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

namespace fq4_reference {

#ifdef FQ4_REFERENCE_64
constexpr int BLOCK  = 64;
constexpr int HEADER = 1;   // bytes of d
constexpr int RUN    = 32;  // weights in the low nibbles of consecutive bytes

inline double scale(const uint8_t * block) {
    const int d = block[0];
    return d == 0 ? 0.0 : d == 255 ? NAN : std::ldexp(1 + d % 8 / 8.0, d / 8 - 24);
}

// Of |d|, the next lower scale.
inline void set_scale(uint8_t * block, float d) {
    int         exponent;
    const float fraction = std::frexp(std::fabs(d), &exponent);
    block[0]             = (uint8_t) (d == 0 ? 0 : 8 * (exponent - 1 + 24) + (int) (16 * fraction) - 8);
}

inline void set_nan(uint8_t * block) {
    block[0] = 255;
}
#else
constexpr int BLOCK  = 256;
constexpr int HEADER = 2;
constexpr int RUN    = 64;

inline double scale(const uint8_t * block) {
    ggml_fp16_t half;
    std::memcpy(&half, block, 2);
    return ggml_fp16_to_fp32(half);
}

inline void set_scale(uint8_t * block, float d) {
    const ggml_fp16_t half = ggml_fp32_to_fp16(d);
    std::memcpy(block, &half, 2);
}

inline void set_nan(uint8_t * block) {
    block[0] = block[1] = 0x7f;
}
#endif

#ifdef FQ4_REFERENCE_3
constexpr int       CODE_BYTES = BLOCK * 3 / 8;
constexpr ggml_type TYPE       = BLOCK == 64 ? GGML_TYPE_FQ3_64 : GGML_TYPE_FQ3;

inline int code_of(const uint8_t * codes, int i) {
    const int low  = codes[i % (BLOCK / 4)] >> i / (BLOCK / 4) * 2;
    const int high = codes[BLOCK / 4 + i % (BLOCK / 8)] >> i / (BLOCK / 8);
    return low % 4 + high % 2 * 4;
}

inline int8_t value_of(int row, int code) {
    return ggml_ext_fq3_table[row][code];
}
#else
constexpr int       CODE_BYTES = BLOCK / 2;
constexpr ggml_type TYPE       = BLOCK == 64 ? GGML_TYPE_FQ4_64 : GGML_TYPE_FQ4;

inline int code_of(const uint8_t * codes, int i) {
    const int byte = codes[i / (2 * RUN) * RUN + i % RUN];
    return i % (2 * RUN) >= RUN ? byte / 16 : byte % 16;
}

inline int8_t value_of(int row, int code) {
    return ggml_ext_fq4_table[row][code];
}
#endif

constexpr size_t BLOCK_BYTES = HEADER + BLOCK / 32 + CODE_BYTES;

// Rows of whole blocks as scale times integer: weights with the scales of fp16, or activations.
struct Rows {
    int64_t             n_blocks;  // of a row
    std::vector<double> d;         // of a block
    std::vector<int8_t> q;         // BLOCK of a block
};

inline void decode(const uint8_t * block, double & d, int8_t * q) {
    d = scale(block);
    for (int i = 0; i < BLOCK; i++) {
        const int row_byte = block[HEADER + i / 32];
        q[i] = value_of(i / 16 % 2 ? row_byte / 16 : row_byte % 16, code_of(block + BLOCK_BYTES - CODE_BYTES, i));
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

// Any bytes are valid: every row index and code is in the table.
inline void random_block(std::mt19937 & rng, float d, uint8_t * block) {
    for (size_t i = 0; i < BLOCK_BYTES; i++) {
        block[i] = (uint8_t) rng();
    }
    set_scale(block, d);
}

}  // namespace fq4_reference
