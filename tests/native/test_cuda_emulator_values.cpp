// The CUDA emulator's functions and instructions, value by value: conversions against ggml's, fragments against the
// tables of the PTX ISA ("Matrix Fragments for mma.m16n8k32", "... m16n8k16", "ldmatrix"), written down here anew.

#include "check.h"
#include "common/device.cuh"
#include "ggml.h"

#include <random>

namespace {

std::mt19937 random_bits(1);

float float_of(uint32_t bits) {
    return __uint_as_float(bits);
}

// --- half and bfloat16 ---

bool same_half(float x) {
    const ggml_fp16_t theirs = ggml_fp32_to_fp16(x);
    const half        ours   = __float2half(x);
    return std::isnan(x) ? (ours.bits & 0x7fff) > 0x7c00 : ours.bits == theirs;
}

bool same_bfloat16(float x) {
    const nv_bfloat16 ours = __float2bfloat16(x);
    return std::isnan(x) ? (ours.bits & 0x7fff) > 0x7f80 : ours.bits == ggml_fp32_to_bf16(x).bits;
}

void check_halves() {
    for (uint32_t bits = 0; bits < 0x10000; bits++) {
        const float theirs = ggml_fp16_to_fp32(ggml_fp16_t(bits)), ours = __half2float({ uint16_t(bits) });
        CHECK(std::isnan(theirs) ? std::isnan(ours) : __float_as_uint(ours) == __float_as_uint(theirs), "half %x",
              bits);
        CHECK(same_half(theirs), "float of half %x", bits);
        if ((bits & 0x7fff) < 0x7c00) {
            // Half way to the next half, and the floats around it: ties go to even. Past 65504 that is infinity.
            const float next =
                (bits & 0x7fff) == 0x7bff ? std::copysign(65536.0f, theirs) : ggml_fp16_to_fp32(ggml_fp16_t(bits + 1));
            const float tie = 0.5f * (theirs + next);
            CHECK(same_half(tie) && same_half(std::nextafterf(tie, 0)) && same_half(std::nextafterf(tie, 2 * tie)),
                  "around the tie above half %x", bits);
        }
    }
    for (int i = 0; i < 300000; i++) {
        const float x = float_of(random_bits());
        CHECK(same_half(x), "half of %a", x);
        CHECK(same_bfloat16(x), "bfloat16 of %a", x);
    }
    for (uint32_t bits = 0; bits < 0x10000; bits++) {
        const float x = __bfloat162float({ uint16_t(bits) });
        CHECK(__float_as_uint(x) == bits << 16, "bfloat16 %x", bits);
        CHECK(same_bfloat16(x) && same_bfloat16(float_of(bits << 16 | 0x8000)), "around bfloat16 %x", bits);
    }
}

// One rounding per operation, to the nearest half and at a tie to the even one. long double holds the exact results of
// these magnitudes.
void check_half_arithmetic() {
    const auto value   = [](half h) { return (long double) __half2float(h); };
    const auto rounded = [&](half got, long double exact) {
        const long double error = std::fabs(value(got) - exact);
        for (int step : { -1, 1 }) {
            const long double other = std::fabs(value({ uint16_t(got.bits + step) }) - exact);  // NaN beside zero
            if (other < error || (other == error && got.bits % 2)) {
                return false;
            }
        }
        return true;
    };
    for (int i = 0; i < 100000; i++) {
        const auto draw = [] { return half{ uint16_t((random_bits() & 0x83ff) | (5 + random_bits() % 17) << 10) }; };
        const half a = draw(), b = draw(), c = draw();
        CHECK(rounded(__hadd(a, b), value(a) + value(b)), "%x + %x", a.bits, b.bits);
        CHECK(rounded(__hsub(a, b), value(a) - value(b)), "%x - %x", a.bits, b.bits);
        CHECK(rounded(__hmul(a, b), value(a) * value(b)), "%x * %x", a.bits, b.bits);
        CHECK(rounded(__hfma(a, b, c), value(a) * value(b) + value(c)), "%x * %x + %x", a.bits, b.bits, c.bits);
        const half2 pair = __hfma2({ a, b }, { b, c }, { c, a });
        CHECK(pair.x.bits == __hfma(a, b, c).bits && pair.y.bits == __hfma(b, c, a).bits, "pairs");
    }
}

// --- integers and conversions ---

void check_integers() {
    const auto unsigned_of = [] { return uint32_t(random_bits()); };
    for (int i = 0; i < 100000; i++) {
        const uint32_t a = unsigned_of(), b = unsigned_of(), c = unsigned_of();
        unsigned char  bytes[8];
        std::memcpy(bytes, &a, 4);
        std::memcpy(bytes + 4, &b, 4);
        uint32_t permuted = 0, with_signs = 0;
        int64_t  dot = int32_t(c) / 2;
        for (int j = 0; j < 4; j++) {
            const uint32_t byte = bytes[c / (1u << 4 * j) % 8];
            permuted |= byte << 8 * j;
            with_signs |= (c / (8u << 4 * j) % 2 ? byte / 128 * 255 : byte) << 8 * j;
            dot += (signed char) bytes[j] * (signed char) bytes[4 + j];
        }
        CHECK(__byte_perm(a, b, c) == permuted, "byte_perm %x %x %x", a, b, c);
        CHECK(ggml_ext::permute_bytes(a, b, c) == with_signs, "permute_bytes %x %x %x", a, b, c);
        CHECK(__dp4a(int(a), int(b), int32_t(c) / 2) == int32_t(dot), "dp4a %x %x", a, b);
        CHECK(__umulhi(a, b) == uint32_t((__extension__(unsigned __int128) a * b) >> 32), "umulhi %x %x", a, b);
        const uint32_t n = c % 32;
        CHECK(__funnelshift_r(a, b, c) == (n ? a >> n | b << (32 - n) : a), "funnelshift_r %x %x %u", a, b, n);
    }
    CHECK(__clz(0) == 32 && __clz(1) == 31 && __clz(-1) == 0, "clz");
    CHECK(__ffs(0) == 0 && __ffs(1) == 1 && __ffs(int(0x80000000)) == 32, "ffs");
    CHECK(__popc(0xf0f0u) == 8 && __popc(0) == 0, "popc");
    CHECK(__float2int_rn(0.5f) == 0 && __float2int_rn(1.5f) == 2 && __float2int_rn(-2.5f) == -2, "ties to even");
    CHECK(__float2int_rn(3e9f) == INT32_MAX && __float2int_rn(-3e9f) == INT32_MIN, "saturation");
    CHECK(__float2int_rn(NAN) == 0, "NaN");
    for (float x : { -3.25f, -1e-3f, 0.0f, 0.7f, 5.5f }) {
        CHECK(std::fabs(ggml_ext::exp2_approx(x) / std::exp2(double(x)) - 1) < 0x1p-22, "2^%g", x);
    }
    CHECK(ggml_ext::exp2_approx(-127.5f) == 0 && ggml_ext::exp2_approx(-INFINITY) == 0, "denormal powers are 0");
}

// --- tensor cores ---
// Position in the matrix of element i of a lane's fragment; group and thread are the ISA's groupID and threadID_in_group.

struct position {
    int row, column;
};

struct fragment_lane {
    int group, thread;

    explicit fragment_lane(int lane) : group(lane >> 2), thread(lane % 4) {}

    position c(int i) const { return { i < 2 ? group : group + 8, thread * 2 + (i & 1) }; }

    position a_s8(int i) const {
        return { (i < 4 || (i >= 8 && i < 12)) ? group : group + 8, thread * 4 + (i & 3) + (i < 8 ? 0 : 16) };
    }

    position b_s8(int i) const { return { thread * 4 + (i & 3) + (i < 4 ? 0 : 16), group }; }

    position a_f16(int i) const {
        return { (i < 2 || (i >= 4 && i < 6)) ? group : group + 8, thread * 2 + (i & 1) + (i < 4 ? 0 : 8) };
    }

    position b_f16(int i) const { return { thread * 2 + (i & 1) + (i < 2 ? 0 : 8), group }; }
};

__global__ void mma_s8_kernel(const int8_t * a, const int8_t * b, int32_t * d) {
    const fragment_lane at(int(threadIdx.x));
    int8_t              a_elements[16], b_elements[8];
    for (int i = 0; i < 16; i++) {
        a_elements[i] = a[at.a_s8(i).row * 32 + at.a_s8(i).column];
    }
    for (int i = 0; i < 8; i++) {
        b_elements[i] = b[at.b_s8(i).row * 8 + at.b_s8(i).column];
    }
    uint32_t a_registers[4], b_registers[2];
    std::memcpy(a_registers, a_elements, sizeof(a_registers));
    std::memcpy(b_registers, b_elements, sizeof(b_registers));
    int32_t sums[4];
    for (int i = 0; i < 4; i++) {
        sums[i] = d[at.c(i).row * 8 + at.c(i).column];
    }
    ggml_ext::mma_s8(sums, a_registers, b_registers);
    for (int i = 0; i < 4; i++) {
        d[at.c(i).row * 8 + at.c(i).column] = sums[i];
    }
}

void check_mma_s8() {
    int8_t  a[16 * 32], b[32 * 8];
    int32_t before[16 * 8], d[16 * 8];
    for (int8_t & x : a) {
        x = int8_t(random_bits());
    }
    for (int8_t & x : b) {
        x = int8_t(random_bits());
    }
    a[0] = b[0] = -128;
    for (int i = 0; i < 16 * 8; i++) {
        d[i] = before[i] = int32_t(random_bits() % 1000);
    }
    ggml_ext_cuda_launch(mma_s8_kernel, dim3(1), dim3(32), 0, nullptr, a, b, d);
    for (int i = 0; i < 16 * 8; i++) {
        int32_t sum = before[i];
        for (int k = 0; k < 32; k++) {
            sum += a[i / 8 * 32 + k] * b[k * 8 + i % 8];
        }
        CHECK(d[i] == sum, "s8 product, row %d, column %d", i / 8, i % 8);
    }
}

__global__ void mma_f16_kernel(const half * a, const half * b, float * d) {
    const fragment_lane at(int(threadIdx.x));
    half                a_elements[8], b_elements[4];
    for (int i = 0; i < 8; i++) {
        a_elements[i] = a[at.a_f16(i).row * 16 + at.a_f16(i).column];
    }
    for (int i = 0; i < 4; i++) {
        b_elements[i] = b[at.b_f16(i).row * 8 + at.b_f16(i).column];
    }
    uint32_t a_registers[4], b_registers[2];
    std::memcpy(a_registers, a_elements, sizeof(a_registers));
    std::memcpy(b_registers, b_elements, sizeof(b_registers));
    float sums[4];
    for (int i = 0; i < 4; i++) {
        sums[i] = d[at.c(i).row * 8 + at.c(i).column];
    }
    ggml_ext::mma_f16(sums, a_registers, b_registers);
    for (int i = 0; i < 4; i++) {
        d[at.c(i).row * 8 + at.c(i).column] = sums[i];
    }
}

void check_mma_f16() {
    half       a[16 * 16], b[16 * 8];
    float      d[16 * 8];
    // Small multiples of 1/8: every sum is exact in float, whatever the order.
    const auto draw = [] { return __float2half(float(int(random_bits() % 65) - 32) / 8); };
    for (half & x : a) {
        x = draw();
    }
    for (half & x : b) {
        x = draw();
    }
    for (int i = 0; i < 16 * 8; i++) {
        d[i] = float(i);
    }
    ggml_ext_cuda_launch(mma_f16_kernel, dim3(1), dim3(32), 0, nullptr, a, b, d);
    for (int i = 0; i < 16 * 8; i++) {
        float sum = float(i);
        for (int k = 0; k < 16; k++) {
            sum += __half2float(a[i / 8 * 16 + k]) * __half2float(b[k * 8 + i % 8]);
        }
        CHECK(d[i] == sum, "f16 product, row %d, column %d: %g, not %g", i / 8, i % 8, d[i], sum);
    }
}

// --- ldmatrix: four matrices of 8 x 8, matrix m row i at 16 * (8 m + i) bytes; element (row, column) of m is
// 64 m + 8 row + column ---

constexpr int n_read = 4 + 2 + 4;

__global__ void ldmatrix_kernel(const uint16_t * matrices, uint32_t * read) {
    const uint16_t * row = matrices + 8 * threadIdx.x;
    const uint16_t * x2  = threadIdx.x < 16 ? row : nullptr;  // must not be read
    uint32_t         four[4], four_trans[4], two[2];
    ggml_ext::ldmatrix_x4(four, row);
    ggml_ext::ldmatrix_x4_trans(four_trans, row);
    ggml_ext::ldmatrix_x2(two, x2);
    uint32_t * mine = read + n_read * threadIdx.x;
    std::memcpy(mine, four, 16);
    std::memcpy(mine + 4, two, 8);
    std::memcpy(mine + 6, four_trans, 16);
}

void check_ldmatrix() {
    alignas(16) uint16_t matrices[256];
    for (int i = 0; i < 256; i++) {
        matrices[i] = uint16_t(i);
    }
    uint32_t read[32 * n_read];
    ggml_ext_cuda_launch(ldmatrix_kernel, dim3(1), dim3(32), 0, nullptr, matrices, read);
    for (int lane = 0; lane < 32; lane++) {
        for (int i = 0; i < n_read; i++) {
            const bool     trans  = i >= 6;
            const int      matrix = (i % 6) % 4;
            const unsigned line = unsigned(lane) / 4, first = 2 * (unsigned(lane) % 4);
            const unsigned low  = 64 * matrix + (trans ? 8 * first + line : 8 * line + first);
            const unsigned high = low + (trans ? 8 : 1);
            CHECK(read[n_read * lane + i] == (low | high << 16), "ldmatrix%s, lane %d, register %d: %x",
                  trans ? ".trans" : "", lane, i, read[n_read * lane + i]);
        }
    }
}

}  // namespace

int main() {
    check_halves();
    check_half_arithmetic();
    check_integers();
    check_mma_s8();
    check_mma_f16();
    check_ldmatrix();
    return check_done();
}
