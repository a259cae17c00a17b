// half, half2 and bfloat16 with the operations of CUDA's headers that our kernels use. Arithmetic is in float with one
// rounding (to nearest even) per operation, which is what the hardware gives for +, -, *, and fma (in double, then
// rounded once to f16: double holds the exact product and, for the magnitudes of f16, the exact sum).

#pragma once

struct half {
    uint16_t bits;
};

struct alignas(4) half2 {
    half x, y;
};

struct __nv_bfloat16 {
    uint16_t bits;
};

using nv_bfloat16 = __nv_bfloat16;
using __half      = half;
using __half2     = half2;

inline float __half2float(half h) {
    const int   exponent = (h.bits >> 10) & 31;
    const int   mantissa = h.bits & 1023;
    const float sign     = h.bits & 0x8000 ? -1.0f : 1.0f;
    if (exponent == 31) {
        return mantissa ? std::nanf("") : sign * INFINITY;
    }
    return sign * (exponent ? std::ldexp(float(mantissa + 1024), exponent - 25) : std::ldexp(float(mantissa), -24));
}

// Rounds to nearest, ties to even, from a double: exact for every result of one operation.
inline half ggml_ext_emulated_half(double x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const double   a    = std::fabs(x);
    if (std::isnan(x)) {
        return { 0x7fff };
    }
    if (a >= 65520.0) {
        return { uint16_t(sign | 0x7c00) };
    }
    // In units of the last place, 2^unit, of a's binade (subnormal below 2^-14). A mantissa of 2048 after rounding
    // carries into the exponent, which is what it should do.
    int exponent;
    std::frexp(a, &exponent);  // a = f * 2^exponent, f in [0.5, 1)
    const int unit     = (exponent > -13 ? exponent : -13) - 11;
    const int mantissa = (int) std::nearbyint(std::ldexp(a, -unit));
    const int biased   = mantissa >= 1024 ? unit + 25 : 1;  // 1 with a mantissa below 1024: subnormal
    return { uint16_t(sign | ((biased - 1) * 1024 + mantissa)) };
}

inline half __ushort_as_half(unsigned short bits) {
    return { bits };
}
inline unsigned short __half_as_ushort(half h) {
    return h.bits;
}
inline half __float2half(float x) {
    return ggml_ext_emulated_half(x);
}
inline half __float2half_rn(float x) {
    return ggml_ext_emulated_half(x);
}
inline half2 __floats2half2_rn(float x, float y) {
    return { __float2half(x), __float2half(y) };
}
inline half2 __float22half2_rn(float2 v) {
    return __floats2half2_rn(v.x, v.y);
}
inline float2 __half22float2(half2 h) {
    return { __half2float(h.x), __half2float(h.y) };
}
inline float __low2float(half2 h) {
    return __half2float(h.x);
}
inline float __high2float(half2 h) {
    return __half2float(h.y);
}
inline half __low2half(half2 h) {
    return h.x;
}
inline half __high2half(half2 h) {
    return h.y;
}
inline half2 __halves2half2(half x, half y) {
    return { x, y };
}
inline half2 __half2half2(half x) {
    return { x, x };
}
inline half2 __float2half2_rn(float x) {
    return __half2half2(__float2half(x));
}
inline half __hadd(half a, half b) {
    return ggml_ext_emulated_half(double(__half2float(a)) + __half2float(b));
}
inline half __hsub(half a, half b) {
    return ggml_ext_emulated_half(double(__half2float(a)) - __half2float(b));
}
inline half __hmul(half a, half b) {
    return ggml_ext_emulated_half(double(__half2float(a)) * __half2float(b));
}
inline half __hfma(half a, half b, half c) {
    return ggml_ext_emulated_half(double(__half2float(a)) * __half2float(b) + __half2float(c));
}
inline half2 __hadd2(half2 a, half2 b) {
    return { __hadd(a.x, b.x), __hadd(a.y, b.y) };
}
inline half2 __hsub2(half2 a, half2 b) {
    return { __hsub(a.x, b.x), __hsub(a.y, b.y) };
}
inline half2 __hmul2(half2 a, half2 b) {
    return { __hmul(a.x, b.x), __hmul(a.y, b.y) };
}
inline half2 __hfma2(half2 a, half2 b, half2 c) {
    return { __hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y) };
}

inline float __bfloat162float(nv_bfloat16 b) {
    const uint32_t bits = uint32_t(b.bits) << 16;
    float          x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
}

inline nv_bfloat16 __float2bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    if (std::isnan(x)) {
        return { 0x7fff };
    }
    return { uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) };
}
