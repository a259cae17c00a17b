// FQ3 products with AVX2.

#include "fq4/cpu/paths.h"

#ifdef GGML_EXT_X86

#    include "block.h"
#    include "fq4/cpu/avx2_mac.h"
#    include "fq4/cpu/x86_256_body.h"

const struct ggml_ext_fq4_path ggml_ext_fq3_avx2 = { "avx2",   ggml_ext_has_avx2, fq4_quantize,
                                                     fq4_dots, fq4_decode,        fq4_multiply };

#endif
