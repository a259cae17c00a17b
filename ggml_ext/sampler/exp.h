// exp of a double <= 0, the same steps in scalars and vectors:
//
//   x = (16 k + j) ln 2 / 16 + r,  |r| <= ln 2 / 32,  exp(x) = 2^k (2^(j/16) + 2^(j/16) (exp(r) - 1))
//
// with a table of 2^(j/16) and the Taylor polynomial of degree 6, whose remainder is r^7 / 5040 < 5e-16. The rounding
// to 16 k + j adds 1.5 * 2^52, so that the low bits of the sum's pattern are the integer.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace ggml_ext_sampling {

constexpr double exp_least   = -700.0;  // below: zero, so that 2^k stays a normal number
constexpr double exp_per_ln2 = 0x1.71547652b82fep+4;
constexpr double exp_shift   = 0x1.8p+52;
constexpr double exp_ln2_hi  = 0x1.62e42fefap-5;  // 36 bits: its products with 16 k + j are exact
constexpr double exp_ln2_lo  = 0x1.cf79abc9e3b3ap-44;
constexpr double exp_c2      = 1.0 / 2;
constexpr double exp_c3      = 1.0 / 6;
constexpr double exp_c4      = 1.0 / 24;
constexpr double exp_c5      = 1.0 / 120;
constexpr double exp_c6      = 1.0 / 720;

alignas(64) constexpr double exp_table[16] = {
    0x1.0000000000000p+0, 0x1.0b5586cf9890fp+0, 0x1.172b83c7d517bp+0, 0x1.2387a6e756238p+0,
    0x1.306fe0a31b715p+0, 0x1.3dea64c123422p+0, 0x1.4bfdad5362a27p+0, 0x1.5ab07dd485429p+0,
    0x1.6a09e667f3bcdp+0, 0x1.7a11473eb0187p+0, 0x1.8ace5422aa0dbp+0, 0x1.9c49182a3f090p+0,
    0x1.ae89f995ad3adp+0, 0x1.c199bdd85529cp+0, 0x1.d5818dcfba487p+0, 0x1.ea4afa2a490dap+0,
};

inline double exp_scalar(double x) {
    if (!(x >= exp_least)) {
        return 0.0;
    }
    const double shifted = std::fma(x, exp_per_ln2, exp_shift);
    const double n       = shifted - exp_shift;
    double       r       = std::fma(-n, exp_ln2_hi, x);
    r                    = std::fma(-n, exp_ln2_lo, r);

    double p = std::fma(exp_c6, r, exp_c5);
    p        = std::fma(p, r, exp_c4);
    p        = std::fma(p, r, exp_c3);
    p        = std::fma(p, r, exp_c2);
    p        = std::fma(p, r, 1.0);
    p        = p * r;

    uint64_t bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    const uint64_t exponent = (bits & ~uint64_t(15)) << 48;
    uint64_t       scaled;
    std::memcpy(&scaled, &exp_table[bits & 15], sizeof(scaled));
    scaled += exponent;
    double s;
    std::memcpy(&s, &scaled, sizeof(s));
    return std::fma(s, p, s);
}

}  // namespace ggml_ext_sampling
