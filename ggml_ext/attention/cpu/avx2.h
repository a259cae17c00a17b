// Attention tiles with AVX2: what its files share.

#ifndef GGML_EXT_ATTENTION_AVX2_CPU_H
#define GGML_EXT_ATTENTION_AVX2_CPU_H

#include "x86.h"

#ifdef GGML_EXT_X86

#    define TARGET GGML_EXT_AVX2
// As in struct ggml_ext_attention_path.
float ggml_ext_attention_quantize_avx2(int n, int n_pad, const float * x, int8_t * codes);
bool  ggml_ext_attention_levels_avx2(int n_groups, float n_levels, float * scale, float * unit, int8_t * negate);
void  ggml_ext_attention_pack_k_avx2(enum ggml_type type, const char * const * rows, int n_blocks, uint8_t * k);
void ggml_ext_attention_pack_v_avx2(enum ggml_type type, const char * const * rows, int n_blocks, const int8_t * negate,
                                    int8_t * v);

void ggml_ext_attention_softcap_avx2(int n, float cap, float * s);
void ggml_ext_attention_weights_avx2(const struct ggml_ext_attention_dims * dims,
                                     const struct ggml_ext_attention_tile * tile, int n,
                                     const struct ggml_ext_attention_rows * rows);

#endif  // GGML_EXT_X86

#endif  // GGML_EXT_ATTENTION_AVX2_CPU_H
