// FQ3_64 products for AVX-512 with VNNI.

#include "fq4/cpu/paths.h"

#ifdef GGML_EXT_X86

#    include "block.h"
#    include "fq4/cpu/avx512_body.h"

const struct ggml_ext_fq4_path ggml_ext_fq3_64_avx512_vnni = { "avx512-vnni", ggml_ext_has_avx512_vnni,
                                                               fq4_quantize,  fq4_dots,
                                                               fq4_decode,    fq4_multiply };

#endif
