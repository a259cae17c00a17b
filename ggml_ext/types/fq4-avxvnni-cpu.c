// FQ4 products with AVX-VNNI: vpdpbusd for processors that have it but no AVX-512.

#include "fq4-paths-cpu.h"

#ifdef GGML_EXT_FQ4_HAS_AVXVNNI

#    include <immintrin.h>

#    define FQ4_TARGET         __attribute__((target("avx2,fma,f16c,avxvnni")))
#    define FQ4_OFFSET         128
#    define fq4_mac(sum, w, y) _mm256_dpbusd_avx_epi32(sum, w, y)

#    include "fq4-x86-256.h"

static bool available(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
           __builtin_cpu_supports("avxvnni");
}

const struct ggml_ext_fq4_path ggml_ext_fq4_avxvnni = { "avx-vnni", available,  fq4_quantize,
                                                        fq4_dots,   fq4_decode, fq4_multiply };

#endif
