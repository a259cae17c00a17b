// What device code of ours may use: CUDA's own names, and wrappers of the PTX instructions that have none. A kernel
// lives in a .cuh that includes only this (and headers of plain structs), so that it also compiles for the emulator
// of tests/native/cuda-emulator, which runs it on a CPU: there every name below has a plain C++ meaning.
//
// Architectures: sm_61 and newer; what needs more says so. GGML_EXT_CUDA_ARCH is __CUDA_ARCH__ in device code.

#pragma once

#ifdef GGML_EXT_CUDA_EMULATED
#    include "emulator.h"
#else

#    include "launch.cuh"

#    include <cuda_bf16.h>
#    include <cuda_fp16.h>
#    include <cuda_runtime.h>

#    include <cstddef>
#    include <cstdint>

#    ifdef __CUDA_ARCH__
#        define GGML_EXT_CUDA_ARCH __CUDA_ARCH__
#    else
#        define GGML_EXT_CUDA_ARCH 0
#    endif

// Dynamic shared memory of the block as a pointer `name`, aligned to 128 bytes.
#    define GGML_EXT_DYNAMIC_SHARED(type, name)                          \
        extern __shared__ __align__(128) char ggml_ext_dynamic_shared[]; \
        type * const                          name = reinterpret_cast<type *>(ggml_ext_dynamic_shared)

namespace ggml_ext {

// A path that the launcher never takes on this architecture.
__device__ __forceinline__ void unreachable_arch() {
    __trap();
}

__device__ __forceinline__ unsigned shared_address(const void * p) {
    return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// --- copies from global to shared memory, asynchronous from sm_80 on, plain before ---

// BYTES: 4 or 16; both pointers are aligned to it. A copy of 16 bytes bypasses L1.
template <int BYTES> __device__ __forceinline__ void cp_async(void * shared, const void * global) {
    static_assert(BYTES == 4 || BYTES == 16, "the sizes that kernels copy");
#    if GGML_EXT_CUDA_ARCH >= 800
    if constexpr (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(shared)), "l"(global) : "memory");
    }
#    else
    if constexpr (BYTES == 16) {
        *static_cast<int4 *>(shared) = *static_cast<const int4 *>(global);
    } else {
        *static_cast<int *>(shared) = *static_cast<const int *>(global);
    }
#    endif
}

// The first n_bytes of 16 aligned ones, 0 to 16; the rest of the 16 in shared memory is undefined, or zeros if n_bytes
// is 0. On a device the rest may be read, which the alignment makes harmless. Bypasses L1.
__device__ __forceinline__ void cp_async_part(void * shared, const void * global, int n_bytes) {
#    if GGML_EXT_CUDA_ARCH >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(n_bytes)
                 : "memory");
#    else
    *static_cast<int4 *>(shared) = n_bytes > 0 ? *static_cast<const int4 *>(global) : make_int4(0, 0, 0, 0);
#    endif
}

// Closes this thread's group of copies.
__device__ __forceinline__ void cp_async_commit() {
#    if GGML_EXT_CUDA_ARCH >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#    endif
}

// Waits until at most PENDING of this thread's latest groups are under way. Other threads see the data after a barrier.
template <int PENDING> __device__ __forceinline__ void cp_async_wait() {
#    if GGML_EXT_CUDA_ARCH >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#    endif
}

// --- ldmatrix (sm_75 and newer): 8 x 8 matrices of 16-bit elements, rows of 16 aligned bytes in shared memory.
// Lane l names row l % 8 of matrix l / 8 (x2: lanes 16 and up are ignored). Lane l gets elements 2 (l % 4) and
// 2 (l % 4) + 1 of row l / 4 of each matrix; trans: of column l / 4 instead. PTX ISA, "ldmatrix".

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void * row) {
#    if GGML_EXT_CUDA_ARCH >= 750
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
#    else
    unreachable_arch();
#    endif
}

__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void * row) {
#    if GGML_EXT_CUDA_ARCH >= 750
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
#    else
    unreachable_arch();
#    endif
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void * row) {
#    if GGML_EXT_CUDA_ARCH >= 750
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
#    else
    unreachable_arch();
#    endif
}

// An 8 x 8 matrix of 16-bit elements in registers, transposed: lane l gives elements 2 (l % 4) and 2 (l % 4) + 1 of row
// l / 4 and gets those of column l / 4. sm_75 and newer. PTX ISA, "movmatrix".
__device__ __forceinline__ uint32_t move_matrix_trans(uint32_t row) {
    uint32_t column = 0;
#    if GGML_EXT_CUDA_ARCH >= 750
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(column) : "r"(row));
#    else
    unreachable_arch();
#    endif
    return column;
}

// --- tensor cores ---
// Fragments of lane l, g = l / 4, t = l % 4 (PTX ISA, "Matrix Fragments for mma.m16n8k32" and "... m16n8k16"):
//   d[0], d[1]: row g, columns 2 t and 2 t + 1; d[2], d[3]: row g + 8, the same columns.
//   s8, k = 32:  a[0]: row g, k 4 t .. 4 t + 3; a[1]: row g + 8; a[2]: row g, k + 16; a[3]: row g + 8, k + 16
//                b[0]: column g, k 4 t .. 4 t + 3; b[1]: k + 16
//   f16, k = 16: a[0]: row g, k 2 t, 2 t + 1; a[1]: row g + 8; a[2]: row g, k + 8; a[3]: row g + 8, k + 8
//                b[0]: column g, k 2 t, 2 t + 1; b[1]: k + 8

// d += a b, s8 x s8 -> s32, no saturation. sm_75 and newer (sm_75 as four m8n8k16).
__device__ __forceinline__ void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#    if GGML_EXT_CUDA_ARCH >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#    elif GGML_EXT_CUDA_ARCH >= 750
    for (int half_k = 0; half_k < 2; half_k++) {
        for (int half_m = 0; half_m < 2; half_m++) {
            asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                : "+r"(d[2 * half_m]), "+r"(d[2 * half_m + 1])
                : "r"(a[2 * half_k + half_m]), "r"(b[half_k]));
        }
    }
#    else
    unreachable_arch();
#    endif
}

// d = c + a b, otherwise as above.
__device__ __forceinline__ void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                       const int32_t (&c)[4]) {
#    if GGML_EXT_CUDA_ARCH >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
#    else
    for (int i = 0; i < 4; i++) {
        d[i] = c[i];
    }
    mma_s8(d, a, b);
#    endif
}

// d += a b, u8 x s8 -> s32, else as mma_s8.
__device__ __forceinline__ void mma_u8s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#    if GGML_EXT_CUDA_ARCH >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#    elif GGML_EXT_CUDA_ARCH >= 750
    for (int half_k = 0; half_k < 2; half_k++) {
        for (int half_m = 0; half_m < 2; half_m++) {
            asm("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                : "+r"(d[2 * half_m]), "+r"(d[2 * half_m + 1])
                : "r"(a[2 * half_k + half_m]), "r"(b[half_k]));
        }
    }
#    else
    unreachable_arch();
#    endif
}

// d += a b, f16 x f16 -> f32. Registers hold two f16, the lower k in the low half. sm_75 and newer.
__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#    if GGML_EXT_CUDA_ARCH >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#    elif GGML_EXT_CUDA_ARCH >= 750
    for (int half_k = 0; half_k < 2; half_k++) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[2 * half_k]), "r"(a[2 * half_k + 1]), "r"(b[half_k]));
    }
#    else
    unreachable_arch();
#    endif
}

// --- programmatic dependent launch (sm_90 and newer; elsewhere a kernel starts when its predecessor is done) ---

// The next kernel of the stream may be launched. It sees nothing of ours before its own wait.
__device__ __forceinline__ void grid_dependency_launch() {
#    if GGML_EXT_CUDA_ARCH >= 900
    cudaTriggerProgrammaticLaunchCompletion();
#    endif
}

// Waits until the previous kernel of the stream is done and its writes are visible. No parameter whose data it writes may
// be __restrict__: the compiler would read it earlier.
__device__ __forceinline__ void grid_dependency_wait() {
#    if GGML_EXT_CUDA_ARCH >= 900
    cudaGridDependencySynchronize();
#    endif
}

// --- arithmetic ---

// x, of which the compiler knows nothing: what follows from it is computed here and not held in registers since before.
template <typename T> __device__ __forceinline__ T keep_out_of_registers(T x) {
    static_assert(sizeof(T) == 4, "a 32-bit register");
    asm volatile("" : "+r"(x));
    return x;
}

// __byte_perm with the sign mode that CUDA's function masks, by an instruction where the selector is no constant. Byte i
// of the result is byte (selector nibble i, low 3 bits) of b:a, or where that nibble's bit 3 is set, eight copies of that
// byte's sign. Bits 16 and up of the selector are ignored. PTX ISA, "prmt", default mode.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    uint32_t d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
    return d;
}

// The bits of a where mask has ones, those of b elsewhere. (With a constant mask, `&` and `|` become two instructions.)
// PTX ISA, "lop3".
__device__ __forceinline__ uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(d) : "r"(a), "r"(b), "r"(mask));
    return d;
}

// 2^x, relative error about 2^-22, denormal results are 0 (ex2.approx.ftz).
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

}  // namespace ggml_ext

#endif  // GGML_EXT_CUDA_EMULATED

namespace ggml_ext {

// Sum over the 2^n lanes whose numbers differ in the low n bits, for all of them; WIDTH = 2^n.
template <int WIDTH = 32, typename T> __device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
    for (int offset = WIDTH / 2; offset > 0; offset /= 2) {
        x += __shfl_xor_sync(0xffffffffu, x, offset);
    }
    return x;
}

template <int WIDTH = 32> __device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int offset = WIDTH / 2; offset > 0; offset /= 2) {
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    }
    return x;
}

template <int WIDTH = 32> __device__ __forceinline__ uint32_t warp_max(uint32_t x) {
#if GGML_EXT_CUDA_ARCH >= 800
    if constexpr (WIDTH == 32) {
        return __reduce_max_sync(0xffffffffu, x);
    } else
#endif
    {
#pragma unroll
        for (int offset = WIDTH / 2; offset > 0; offset /= 2) {
            const uint32_t other = __shfl_xor_sync(0xffffffffu, x, offset);
            x                    = other > x ? other : x;
        }
        return x;
    }
}

}  // namespace ggml_ext
