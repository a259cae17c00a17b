// The body of the AVX-VNNI path with the EVEX form of its one instruction, which more machines have: so the path is
// tested and timed where AVX-VNNI itself is missing. No path of the library, since AVX-512 VNNI has better ones.

#pragma once

#include "types/fq4-cpu.h"

#if defined(__x86_64__) && defined(__GNUC__)

#    define FQ4_EVEX256 1
#    include <immintrin.h>

#    define FQ4_TARGET         __attribute__((target("avx2,fma,f16c,avx512f,avx512vl,avx512vnni")))
#    define FQ4_OFFSET         128
#    define fq4_mac(sum, w, y) _mm256_dpbusd_epi32(sum, w, y)

#    include "types/fq4-x86-256.h"

static bool evex256_available() {
    return __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

static const ggml_ext_fq4_path evex256_path = { "avx-vnni's body", evex256_available, fq4_quantize,
                                                fq4_dots,          fq4_decode,        fq4_multiply };

#endif
