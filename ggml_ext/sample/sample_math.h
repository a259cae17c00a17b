// Orders, masses and thresholds of GGML_EXT_OP_SAMPLE: the same bits on the CPU and in CUDA. Every float operation
// below is one correctly rounded operation or an fmaf; none is a product that is then added to, so no compiler can
// contract it, and none gets a denormal that would matter, so flushing them changes nothing.

#pragma once

#include "core/ext_op.h"

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#    define GGML_EXT_SAMPLE_INLINE static __host__ __device__ __forceinline__
#else
#    define GGML_EXT_SAMPLE_INLINE static inline
#endif

// Keys: floats as integers of the same order; -0 and 0 are one.
GGML_EXT_SAMPLE_INLINE uint32_t ggml_ext_sample_key(float logit) {
    uint32_t bits;
    memcpy(&bits, &logit, sizeof(bits));
    bits = bits == 0x80000000u ? 0 : bits;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

GGML_EXT_SAMPLE_INLINE float ggml_ext_sample_logit(uint32_t key) {
    const uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
    float          logit;
    memcpy(&logit, &bits, sizeof(logit));
    return logit;
}

constexpr uint32_t ggml_ext_sample_key_infinity = 0x7f800000u | 0x80000000u;
constexpr uint32_t ggml_ext_sample_key_nothing  = ~0xff800000u;  // of -Inf

// NaN has a key above that of Inf, or below that of -Inf.
GGML_EXT_SAMPLE_INLINE bool ggml_ext_sample_wrong(uint32_t key) {
    return key >= ggml_ext_sample_key_infinity || key < ggml_ext_sample_key_nothing;
}

// Places: the order of candidates, largest first. Larger logits first, of equal ones the lower id.
GGML_EXT_SAMPLE_INLINE uint64_t ggml_ext_sample_place(uint32_t key, uint32_t id) {
    return uint64_t(key) << 32 | (0xffffffffu - id);
}

GGML_EXT_SAMPLE_INLINE int32_t ggml_ext_sample_id(uint64_t place) {
    return int32_t(0xffffffffu - uint32_t(place));
}

// Mass of a token with x = (logit - max) / temperature: exp(x) in units of 2^-40, rounded down. With x = n ln 2 + r,
// |r| <= ln 2 / 2, it is 2^n times the Taylor polynomial of degree 7, whose remainder is below 6e-9 of it.
constexpr int ggml_ext_sample_mass_bits = 40;

GGML_EXT_SAMPLE_INLINE uint64_t ggml_ext_sample_mass(float x) {
    if (!(x > -27.73f)) {  // exp(x) < 2^-40
        return 0;
    }
    const float shift   = 0x1.8p23f;  // the sum's low bits are n
    const float shifted = fmaf(x, 0x1.715476p+0f, shift);
    const float n       = shifted - shift;
    float       r       = fmaf(n, -0x1.63p-1f, x);  // 9 bits of ln 2: the product with n is exact
    r                   = fmaf(n, 0x1.bd0106p-13f, r);

    float p = fmaf(1.0f / 5040, r, 1.0f / 720);
    p       = fmaf(p, r, 1.0f / 120);
    p       = fmaf(p, r, 1.0f / 24);
    p       = fmaf(p, r, 1.0f / 6);
    p       = fmaf(p, r, 1.0f / 2);
    p       = fmaf(p, r, 1.0f);
    p       = fmaf(p, r, 1.0f);

    uint32_t bits;
    memcpy(&bits, &shifted, sizeof(bits));
    bits = (bits - 0x4b400000u + 127 + ggml_ext_sample_mass_bits) << 23;
    float scale;
    memcpy(&scale, &bits, sizeof(scale));
    return uint64_t(p * scale);
}

// The least sum of masses that is p of the total, at least 1. p < 1 counts in units of 2^-32, rounded down.
GGML_EXT_SAMPLE_INLINE uint64_t ggml_ext_sample_share(float p, uint64_t total) {
    if (!(p > 0)) {
        return 1;
    }
    const uint64_t units = uint64_t(double(p) * 0x1p32);
    const uint64_t sum   = units * (total >> 32) + ((units * (total & 0xffffffffu) + 0xffffffffu) >> 32);
    return sum > 0 ? sum : 1;
}

// floor(uniform * total / 2^64)
GGML_EXT_SAMPLE_INLINE uint64_t ggml_ext_sample_scaled(uint64_t uniform, uint64_t total) {
    const uint64_t a = uniform >> 32, b = uniform & 0xffffffffu, c = total >> 32, d = total & 0xffffffffu;
    const uint64_t middle = a * d + (b * d >> 32);
    return a * c + (middle >> 32) + ((b * c + (middle & 0xffffffffu)) >> 32);
}

// The place at which the prefix of min-p ends: all logits >= max + ln p, or for p > 1 the best candidate alone.
GGML_EXT_SAMPLE_INLINE uint64_t ggml_ext_sample_min_p(uint64_t best, double log_min_p) {
    const double limit = double(ggml_ext_sample_logit(uint32_t(best >> 32))) + log_min_p;
    if (log_min_p >= 0) {
        return log_min_p > 0 ? best : best >> 32 << 32;
    }
    if (!(limit > -3.4028234663852886e38)) {
        return 0;
    }
    const float least = float(limit);
    return ggml_ext_sample_place(ggml_ext_sample_key(least) + (double(least) < limit ? 1 : 0), 0xffffffffu);
}

// 1 / temperature, at least 1e-30; 0 where the largest logit is the token.
GGML_EXT_SAMPLE_INLINE float ggml_ext_sample_inverse(float temperature) {
    if (!(temperature > 1e-30f)) {
        return 0;
    }
    temperature = temperature < 1e30f ? temperature : 1e30f;
#ifdef __CUDA_ARCH__
    return __frcp_rn(temperature);  // -use_fast_math makes a division approximate
#else
    return 1.0f / temperature;
#endif
}
