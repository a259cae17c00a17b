// The layout, in device code, of the type that fq4-reference.h is of.

#pragma once

#include "fq4-reference.h"
#include "fq4/fq4.cuh"

namespace fq4_reference {

#ifdef FQ4_REFERENCE_64
using layout                  = ggml_ext::fq4_64_layout;
constexpr auto dequantize_row = ggml_ext_fq4_64_dequantize_row;
#else
using layout                  = ggml_ext::fq4_layout;
constexpr auto dequantize_row = ggml_ext_fq4_dequantize_row;
#endif

static_assert(layout::weights == BLOCK && layout::bytes == int(BLOCK_BYTES) && layout::s == HEADER &&
                  layout::run == RUN,
              "the same type");

// Addresses that blocks start at, modulo 16: the i-th.
inline int remainder_of(int i) {
    return i * layout::alignment % 16;
}

}  // namespace fq4_reference
