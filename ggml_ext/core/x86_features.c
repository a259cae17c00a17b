#include "x86_features.h"

#if defined(__x86_64__) && defined(__GNUC__)

#    include <cpuid.h>
#    include <stdatomic.h>
#    include <stdint.h>

enum x86_feature {
    AVX2        = 1 << 0,  // with FMA, F16C and POPCNT
    AVX_VNNI    = 1 << 1,
    AVX512      = 1 << 2,  // F, BW, VL, DQ
    AVX512_VNNI = 1 << 3,
    AVX512_VBMI = 1 << 4,
    ASKED       = 1 << 5,
};

struct x86_registers {
    unsigned int eax, ebx, ecx, edx;
};

static struct x86_registers x86_cpuid(unsigned int leaf, unsigned int subleaf) {
    struct x86_registers r = { 0, 0, 0, 0 };
    if ((unsigned int) __get_cpuid_max(0, NULL) >= leaf) {
        __cpuid_count(leaf, subleaf, r.eax, r.ebx, r.ecx, r.edx);
    }
    return r;
}

static bool x86_has(unsigned int reg, unsigned int bits) {
    return (reg & bits) == bits;
}

// Intel's manual, volume 2, CPUID.
static unsigned int x86_detect(void) {
    const unsigned int popcnt = 1u << 23, osxsave = 1u << 27, fma = 1u << 12, f16c = 1u << 29;     // leaf 1, ecx
    const unsigned int avx2 = 1u << 5, f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31;  // leaf 7, ebx
    const unsigned int vbmi = 1u << 1, vnni = 1u << 11;                                            // leaf 7, ecx
    const unsigned int avx_vnni  = 1u << 4;                                                        // leaf 7.1, eax
    const unsigned int ymm_saved = 0x06, zmm_saved = 0xe6;                                         // XCR0

    const struct x86_registers basic = x86_cpuid(1, 0);
    if (!x86_has(basic.ecx, osxsave)) {
        return 0;
    }
    unsigned int saved, high;
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    const struct x86_registers extended = x86_cpuid(7, 0);
    if (!x86_has(saved, ymm_saved) || !x86_has(basic.ecx, popcnt | fma | f16c) || !x86_has(extended.ebx, avx2)) {
        return 0;
    }
    unsigned int found = AVX2;
    if (extended.eax >= 1 && x86_has(x86_cpuid(7, 1).eax, avx_vnni)) {
        found |= AVX_VNNI;
    }
    if (x86_has(saved, zmm_saved) && x86_has(extended.ebx, f | dq | bw | vl)) {
        found |= AVX512;
        found |= x86_has(extended.ecx, vnni) ? AVX512_VNNI : 0;
        found |= x86_has(extended.ecx, vnni | vbmi) ? AVX512_VBMI : 0;
    }
    return found;
}

// CPUID leaves a virtual machine, which takes microseconds, and ops ask once each: the answer is kept. Threads that
// race here store the same one.
static bool x86_available(enum x86_feature feature) {
    static atomic_uint kept  = 0;
    unsigned int       found = atomic_load_explicit(&kept, memory_order_relaxed);
    if (!found) {
        found = x86_detect() | ASKED;
        atomic_store_explicit(&kept, found, memory_order_relaxed);
    }
    return found & feature;
}

bool ggml_ext_has_avx2(void) {
    return x86_available(AVX2);
}

bool ggml_ext_has_avx_vnni(void) {
    return x86_available(AVX_VNNI);
}

bool ggml_ext_has_avx512(void) {
    return x86_available(AVX512);
}

bool ggml_ext_has_avx512_vnni(void) {
    return x86_available(AVX512_VNNI);
}

bool ggml_ext_has_avx512_vbmi(void) {
    return x86_available(AVX512_VBMI);
}

#endif
