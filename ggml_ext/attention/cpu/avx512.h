// Attention tiles with AVX-512, VNNI and VBMI: what its two files share.

#ifndef GGML_EXT_ATTENTION_AVX512_CPU_H
#define GGML_EXT_ATTENTION_AVX512_CPU_H

#include "x86.h"

#ifdef GGML_EXT_X86

#    define TARGET GGML_EXT_AVX512_VBMI
// As in struct ggml_ext_attention_path.
float ggml_ext_attention_quantize_avx512(int n, int n_pad, const float * x, int8_t * codes);
bool  ggml_ext_attention_levels_avx512(int n_groups, float n_levels, float * scale, float * unit, int8_t * negate);
void  ggml_ext_attention_pack_k_avx512(enum ggml_type type, const char * const * rows, int n_blocks, uint8_t * k);
void  ggml_ext_attention_pack_v_avx512(enum ggml_type type, const char * const * rows, int n_blocks,
                                       const int8_t * negate, int8_t * v);

#endif  // GGML_EXT_X86

#endif  // GGML_EXT_ATTENTION_AVX512_CPU_H
