// CUDA's built-in functions, on one thread or over a warp or block.

#pragma once

inline void __syncthreads() {
    ggml_ext_emulator::block_barrier(0);
}
inline int __syncthreads_or(int predicate) {
    return ggml_ext_emulator::block_barrier(predicate != 0) != 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
    ggml_ext_emulator::share(mask, 0);
}

// --- shuffles: width is a power of two; a lane that a source lies outside of keeps its own value ---

template <typename T> T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    const auto     all  = ggml_ext_emulator::share(mask, value);
    const unsigned lane = ggml_ext_emulator::lane();
    return all[(lane & ~unsigned(width - 1)) | (unsigned(source) & unsigned(width - 1))];
}
template <typename T> T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
    const auto     all    = ggml_ext_emulator::share(mask, value);
    const unsigned lane   = ggml_ext_emulator::lane();
    const unsigned source = lane ^ unsigned(lane_mask);
    return source / unsigned(width) > lane / unsigned(width) ? value : all[source];
}
template <typename T> T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const auto     all   = ggml_ext_emulator::share(mask, value);
    const unsigned lane  = ggml_ext_emulator::lane();
    const unsigned inner = lane & unsigned(width - 1);
    return inner < delta ? value : all[lane - delta];
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    const auto all    = ggml_ext_emulator::share(mask, predicate);
    unsigned   result = 0;
    for (unsigned lane = 0; lane < 32; lane++) {
        if ((mask >> lane & 1) && all[lane]) {
            result |= 1u << lane;
        }
    }
    return result;
}
inline int __any_sync(unsigned mask, int predicate) {
    return __ballot_sync(mask, predicate) != 0;
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
    const auto all    = ggml_ext_emulator::share(mask, value);
    unsigned   result = 0;
    for (unsigned lane = 0; lane < 32; lane++) {
        if ((mask >> lane & 1) && all[lane] > result) {
            result = all[lane];
        }
    }
    return result;
}
// --- atomics: threads run one at a time ---

template <typename T> T atomicAdd(T * p, std::common_type_t<T> x) {
    const T old = *p;
    *p          = old + x;
    return old;
}
template <typename T> T atomicMax(T * p, std::common_type_t<T> x) {
    const T old = *p;
    *p          = old < x ? x : old;
    return old;
}

// --- integers ---

inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++) {
        c += int(int8_t(a >> 8 * i)) * int(int8_t(b >> 8 * i));
    }
    return c;
}
// Byte i of the result is byte (selector nibble i) of b:a. Bit 3 of a nibble is ignored: CUDA's function masks it, so
// that PTX's prmt never sees its sign mode.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t both   = uint64_t(b) << 32 | a;
    unsigned       result = 0;
    for (int i = 0; i < 4; i++) {
        result |= unsigned(both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    }
    return result;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return unsigned((uint64_t(high) << 32 | low) >> (shift & 31));
}
// Shifts of 32 and more count as 32.
inline unsigned __funnelshift_rc(unsigned low, unsigned high, unsigned shift) {
    return shift < 32 ? __funnelshift_r(low, high, shift) : high;
}
inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}
inline int __clz(int x) {
    return x ? __builtin_clz(unsigned(x)) : 32;
}
inline int __ffs(int x) {
    return __builtin_ffs(x);
}
inline unsigned __umulhi(unsigned a, unsigned b) {
    return unsigned(uint64_t(a) * b >> 32);
}

// min and max of CUDA's device code.
inline int min(int a, int b) {
    return a < b ? a : b;
}
inline int max(int a, int b) {
    return a > b ? a : b;
}
inline unsigned min(unsigned a, unsigned b) {
    return a < b ? a : b;
}
inline unsigned max(unsigned a, unsigned b) {
    return a > b ? a : b;
}
inline int64_t min(int64_t a, int64_t b) {
    return a < b ? a : b;
}
inline int64_t max(int64_t a, int64_t b) {
    return a > b ? a : b;
}
inline uint64_t min(uint64_t a, uint64_t b) {
    return a < b ? a : b;
}
inline uint64_t max(uint64_t a, uint64_t b) {
    return a > b ? a : b;
}

// --- floats; conversions round to nearest even and saturate, NaN becomes 0 ---

inline int __float2int_rn(float x) {
    if (std::isnan(x)) {
        return 0;
    }
    if (x >= 2147483648.0f) {
        return INT32_MAX;
    }
    return x < -2147483648.0f ? INT32_MIN : int(std::nearbyintf(x));
}
inline int __float_as_int(float x) {
    int bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits;
}
inline unsigned __float_as_uint(float x) {
    return unsigned(__float_as_int(x));
}
inline float __int_as_float(int bits) {
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
}
inline float __uint_as_float(unsigned bits) {
    return __int_as_float(int(bits));
}
inline float __fdividef(float a, float b) {
    return a / b;
}
inline float __fdiv_rn(float a, float b) {
    return a / b;
}
inline float __fmaf_rn(float a, float b, float c) {
    return std::fma(a, b, c);
}
inline float rsqrtf(float x) {
    return 1.0f / std::sqrt(x);
}

template <typename T> T __ldg(const T * p) {
    return *p;
}
