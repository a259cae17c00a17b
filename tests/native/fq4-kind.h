// The kernels of the type that fq4-reference.h is of.

#pragma once

#include "fq4-reference.h"
#ifdef FQ4_REFERENCE_64
#    include "fq4_64/cpu/block.h"
#else
#    include "fq4/cpu/block.h"
#endif

namespace fq4_reference {

#ifdef FQ4_REFERENCE_64
const ggml_ext_fq4_kind & KIND = ggml_ext_fq4_64_kernels;
#else
const ggml_ext_fq4_kind & KIND = ggml_ext_fq4_kernels;
#endif

}  // namespace fq4_reference
