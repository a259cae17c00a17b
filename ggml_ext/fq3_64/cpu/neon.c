// FQ3_64 products for aarch64 with dot products of int8.

#include "fq4/cpu/paths.h"

#ifdef GGML_EXT_FQ4_HAS_NEON

#    include "block.h"
#    include "fq4/cpu/neon_body.h"

const struct ggml_ext_fq4_path ggml_ext_fq3_64_neon = { "neon-dotprod", fq4_available, fq4_quantize,
                                                        fq4_dots,       fq4_decode,    fq4_multiply };

#endif
