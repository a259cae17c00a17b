// The body of the AVX-VNNI path with the EVEX form of its one instruction, which more machines have: so the path is
// tested and timed where AVX-VNNI itself is missing. No path of the library, since AVX-512 VNNI has better ones.

#pragma once

#ifndef FQ4_BLOCK_H
#    define FQ4_BLOCK_H "fq4/cpu/block.h"
#endif

#include "core/x86.h"
#include FQ4_BLOCK_H

#ifdef GGML_EXT_X86

#    define FQ4_EVEX256 1

#    define FQ4_TARGET         GGML_EXT_AVX512_VNNI
#    define FQ4_OFFSET         128
#    define fq4_mac(sum, w, y) _mm256_dpbusd_epi32(sum, w, y)

#    include "fq4/cpu/x86_256_body.h"

static const ggml_ext_fq4_path evex256_path = { "avx-vnni's body", ggml_ext_has_avx512_vnni,
                                                fq4_quantize,      fq4_dots,
                                                fq4_decode,        fq4_multiply };

#endif
