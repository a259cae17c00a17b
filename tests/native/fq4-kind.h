// The kernels of the type that fq4-reference.h is of.

#pragma once

#include "fq4-reference.h"

#ifndef FQ4_BLOCK_H
#    define FQ4_BLOCK_H "fq4/cpu/block.h"
#endif
#include FQ4_BLOCK_H

namespace fq4_reference {

const ggml_ext_fq4_kind & KIND = *ggml_ext_fq4_kind_of(TYPE);

}  // namespace fq4_reference
