// What cuda/common/device.cuh makes of PTX instructions, after the fragments that the PTX ISA documents. Same names and
// meaning as there.

#pragma once

namespace ggml_ext {

[[noreturn]] inline void unreachable_arch() {
    ggml_ext_emulator::fail("a path that this architecture does not have");
}

template <int BYTES> void cp_async(void * shared, const void * global) {
    static_assert(BYTES == 4 || BYTES == 16, "the sizes that kernels copy");
    if (uintptr_t(shared) % BYTES || uintptr_t(global) % BYTES) {
        ggml_ext_emulator::fail("cp_async: an address is not aligned to the size");
    }
    ggml_ext_emulator::async_copy(shared, global, BYTES, true);
}
inline void cp_async_part(void * shared, const void * global, int n_bytes) {
    if (uintptr_t(shared) % 16 || uintptr_t(global) % 16 || n_bytes < 0 || n_bytes > 16) {
        ggml_ext_emulator::fail("cp_async_part: an address is not aligned to 16 bytes, or a wrong number of them");
    }
    ggml_ext_emulator::async_copy(shared, global, n_bytes ? size_t(n_bytes) : 16, n_bytes > 0);
}
inline void cp_async_commit() {
    ggml_ext_emulator::async_commit();
}
template <int PENDING> void cp_async_wait() {
    ggml_ext_emulator::async_wait(PENDING);
}

struct emulated_row {
    uint16_t values[8];
};

// Each lane reads its row when it arrives, so a row that another lane wrote needs a __syncwarp before.
template <int N, bool TRANS> void emulated_ldmatrix(uint32_t (&r)[N], const void * row) {
    const unsigned lane = ggml_ext_emulator::lane(), g = lane / 4, t = lane % 4;
    emulated_row   mine = {};
    if (lane < 8 * N) {
        if (uintptr_t(row) % 16) {
            ggml_ext_emulator::fail("ldmatrix: a row is not aligned to 16 bytes");
        }
        std::memcpy(&mine, row, sizeof(mine));
    }
    const auto rows    = ggml_ext_emulator::share(0xffffffffu, mine);
    const auto element = [&](unsigned i, unsigned line, unsigned column) {
        return uint32_t(rows[8 * i + line].values[column]);
    };
    for (unsigned i = 0; i < N; i++) {
        r[i] = TRANS ? element(i, 2 * t, g) | element(i, 2 * t + 1, g) << 16 :
                       element(i, g, 2 * t) | element(i, g, 2 * t + 1) << 16;
    }
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void * row) {
    emulated_ldmatrix<4, false>(r, row);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void * row) {
    emulated_ldmatrix<2, false>(r, row);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void * row) {
    emulated_ldmatrix<4, true>(r, row);
}
inline uint32_t move_matrix_trans(uint32_t row) {
    const auto     rows = ggml_ext_emulator::share(0xffffffffu, row);
    const unsigned lane = ggml_ext_emulator::lane(), g = lane / 4, t = lane % 4;
    const auto     element = [&](unsigned line) { return rows[4 * line + g / 2] >> 16 * (g % 2) & 0xffff; };
    return element(2 * t) | element(2 * t + 1) << 16;
}

struct emulated_fragments {
    uint32_t a[4], b[2];
};

// Calls product(row register of a, column register of b, accumulator) for the terms of this lane's four results.
// Register pairs of k: a[0] and a[2] (rows g), a[1] and a[3] (rows g + 8) with b[0] and b[1].
template <typename D, typename F>
void emulated_mma(D (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const F & product) {
    emulated_fragments mine;
    std::memcpy(mine.a, a, sizeof(a));
    std::memcpy(mine.b, b, sizeof(b));
    const auto     all  = ggml_ext_emulator::share(0xffffffffu, mine);
    const unsigned lane = ggml_ext_emulator::lane(), g = lane / 4, t = lane % 4;
    for (unsigned column = 0; column < 2; column++) {
        for (unsigned source = 0; source < 4; source++) {
            const emulated_fragments row = all[4 * g + source], other = all[4 * (2 * t + column) + source];
            for (unsigned k = 0; k < 2; k++) {
                product(row.a[2 * k], other.b[k], d[column]);
                product(row.a[2 * k + 1], other.b[k], d[2 + column]);
            }
        }
    }
}

inline void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulated_mma(d, a, b, [](uint32_t x, uint32_t y, int32_t & sum) { sum = __dp4a(int(x), int(y), sum); });
}
inline void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const int32_t (&c)[4]) {
    std::memcpy(d, c, sizeof(d));
    mma_s8(d, a, b);
}
inline void mma_u8s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulated_mma(d, a, b, [](uint32_t x, uint32_t y, int32_t & sum) {
        for (int i = 0; i < 4; i++) {
            sum += int(uint8_t(x >> 8 * i)) * int(int8_t(y >> 8 * i));
        }
    });
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulated_mma(d, a, b, [](uint32_t x, uint32_t y, float & sum) {
        for (int i = 0; i < 2; i++) {
            sum += __half2float({ uint16_t(x >> 16 * i) }) * __half2float({ uint16_t(y >> 16 * i) });
        }
    });
}

inline void grid_dependency_launch() {}
inline void grid_dependency_wait() {
    ggml_ext_emulator::wait_for_grid();
}

template <typename T> T keep_out_of_registers(T x) {
    return x;
}

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    uint32_t result = 0;
    for (int i = 0; i < 4; i++) {
        const uint32_t nibble = selector >> 4 * i;
        uint32_t       byte   = ((nibble & 4 ? b : a) >> 8 * (nibble & 3)) & 0xff;
        if (nibble & 8) {
            byte = byte >> 7 ? 0xff : 0;
        }
        result |= byte << 8 * i;
    }
    return result;
}

inline uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) {
    return (a & mask) | (b & ~mask);
}

inline float exp2_approx(float x) {
    const float y = std::exp2(x);
    return std::fabs(y) < 0x1p-126f ? 0.0f : y;
}

}  // namespace ggml_ext
