// FQ3 products with AVX-VNNI: vpdpbusd for processors that have it but no AVX-512.

#include "fq4/cpu/paths.h"

#ifdef GGML_EXT_AVX_VNNI

#    define FQ4_TARGET         GGML_EXT_AVX_VNNI
#    define FQ4_OFFSET         128
#    define fq4_mac(sum, w, y) _mm256_dpbusd_avx_epi32(sum, w, y)

#    include "block.h"
#    include "fq4/cpu/x86_256_body.h"

const struct ggml_ext_fq4_path ggml_ext_fq3_avxvnni = { "avx-vnni", ggml_ext_has_avx_vnni, fq4_quantize, fq4_dots,
                                                        fq4_decode, fq4_multiply };

#endif
