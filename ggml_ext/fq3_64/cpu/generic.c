// FQ3_64 products in plain C.

#include "block.h"
#include "fq4/cpu/generic_body.h"
#include "fq4/cpu/paths.h"

const struct ggml_ext_fq4_path ggml_ext_fq3_64_generic = { "generic", ggml_ext_always, fq4_quantize,
                                                           fq4_dots,  fq4_decode,      fq4_multiply };
