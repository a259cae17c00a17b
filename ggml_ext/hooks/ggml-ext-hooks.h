// What the hook lines in upstream's files call or include. Included by patched upstream sources only.

#ifndef GGML_EXT_HOOKS_H
#define GGML_EXT_HOOKS_H

#include "core/ext_op.h"
#include "fq3/fq3.h"
#include "fq3_64/fq3_64.h"
#include "fq4/fq4.h"
#include "fq4_64/fq4_64.h"

// The cases of ggml_validate_row_data. FP16: upstream's check of blocks with an fp16 scale d.
#define GGML_EXT_VALIDATE_CASES(FP16)              \
    case GGML_TYPE_FQ4: {                          \
        FP16(ggml_ext_block_fq4, data, nb);        \
    } break;                                       \
    case GGML_TYPE_FQ3: {                          \
        FP16(ggml_ext_block_fq3, data, nb);        \
    } break;                                       \
    case GGML_TYPE_FQ4_64:                         \
        return ggml_ext_fq4_64_validate(data, nb); \
    case GGML_TYPE_FQ3_64:                         \
        return ggml_ext_fq3_64_validate(data, nb);

// The cases of ggml_quantize_chunk.
#define GGML_EXT_QUANTIZE_CASES                              \
    GGML_EXT_QUANTIZE_CASE(FQ4, ggml_ext_fq4_quantize)       \
    GGML_EXT_QUANTIZE_CASE(FQ4_64, ggml_ext_fq4_64_quantize) \
    GGML_EXT_QUANTIZE_CASE(FQ3, ggml_ext_fq3_quantize)       \
    GGML_EXT_QUANTIZE_CASE(FQ3_64, ggml_ext_fq3_64_quantize)
#define GGML_EXT_QUANTIZE_CASE(type, quantize)                                                          \
    case GGML_TYPE_##type:                                                                              \
        result = quantize(src + start, (char *) dst + start_row * row_size, nrows, n_per_row, imatrix); \
        break;

#endif  // GGML_EXT_HOOKS_H
