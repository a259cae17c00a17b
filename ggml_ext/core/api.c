// The public API of ggml-ext.h that lives in ggml-base.

#include "ggml-ext.h"
#include "ggml-impl.h"

#include <string.h>
#include <strings.h>

int32_t ggml_ext_format_version(void) {
    return GGML_EXT_FORMAT_VERSION;
}

// Ids that upstream or we use; removed types and the gap below our ids have no block size.
static bool type_exists(int32_t type) {
    return type >= 0 && type < GGML_TYPE_COUNT && ggml_get_type_traits((enum ggml_type) type)->blck_size > 0;
}

int32_t ggml_ext_type_from_name(const char * name) {
    for (int32_t type = 0; name != NULL && type < GGML_TYPE_COUNT; type++) {
        if (type_exists(type) && strcasecmp(name, ggml_type_name((enum ggml_type) type)) == 0) {
            return type;
        }
    }
    return GGML_EXT_E_TYPE;
}

const char * ggml_ext_type_name(int32_t type) {
    return type_exists(type) ? ggml_type_name((enum ggml_type) type) : NULL;
}

int64_t ggml_ext_block_size(int32_t type) {
    return type_exists(type) ? ggml_blck_size((enum ggml_type) type) : GGML_EXT_E_TYPE;
}

int64_t ggml_ext_row_size(int32_t type, int64_t n_per_row) {
    if (!type_exists(type)) {
        return GGML_EXT_E_TYPE;
    }
    if (n_per_row < 0 || n_per_row % ggml_blck_size((enum ggml_type) type) != 0) {
        return GGML_EXT_E_SHAPE;
    }
    return (int64_t) ggml_row_size((enum ggml_type) type, n_per_row);
}

// Types that ggml_quantize_chunk knows: those with a reference encoder, and the IQ types, whose
// encoders need their importance matrix or grids and have no row function.
static bool can_quantize(enum ggml_type type) {
    if (type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16) {
        return true;
    }
    // Q8_1 and Q8_K exist for activations only.
    return ggml_is_quantized(type) && type != GGML_TYPE_Q8_1 && type != GGML_TYPE_Q8_K;
}

int32_t ggml_ext_needs_imatrix(int32_t type) {
    if (!type_exists(type) || !can_quantize((enum ggml_type) type)) {
        return GGML_EXT_E_TYPE;
    }
    return ggml_quantize_requires_imatrix((enum ggml_type) type) ? 1 : 0;
}

int64_t ggml_ext_quantize(int32_t type, const float * src, void * dst, int64_t nrows, int64_t n_per_row,
                          const float * imatrix) {
    const int32_t needs_imatrix = ggml_ext_needs_imatrix(type);
    if (needs_imatrix < 0 || (needs_imatrix == 1 && imatrix == NULL)) {
        return GGML_EXT_E_TYPE;
    }
    const int64_t row_size = ggml_ext_row_size(type, n_per_row);
    if (row_size < 0 || nrows < 0) {
        return GGML_EXT_E_SHAPE;
    }
    if (nrows == 0 || n_per_row == 0) {
        return 0;
    }
    const int64_t size = (int64_t) ggml_quantize_chunk((enum ggml_type) type, src, dst, 0, nrows, n_per_row, imatrix);
    return ggml_validate_row_data((enum ggml_type) type, dst, (size_t) size) ? size : GGML_EXT_E_FINITE;
}

int64_t ggml_ext_dequantize(int32_t type, const void * src, float * dst, int64_t nrows, int64_t n_per_row) {
    const int64_t row_size = ggml_ext_row_size(type, n_per_row);
    if (row_size == GGML_EXT_E_TYPE) {
        return GGML_EXT_E_TYPE;
    }
    if (row_size < 0 || nrows < 0) {
        return GGML_EXT_E_SHAPE;
    }
    if (type == GGML_TYPE_F32) {
        memcpy(dst, src, (size_t) (nrows * row_size));
        return nrows * n_per_row;
    }
    const ggml_to_float_t to_float = ggml_get_type_traits((enum ggml_type) type)->to_float;
    if (to_float == NULL) {
        return GGML_EXT_E_TYPE;
    }
    for (int64_t row = 0; row < nrows; row++) {
        to_float((const char *) src + row * row_size, dst + row * n_per_row, n_per_row);
    }
    return nrows * n_per_row;
}
