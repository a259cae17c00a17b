// The public API of ggml-ext.h that lives in ggml-cpu.

#include "ggml-cpu.h"
#include "ggml-ext.h"
#include "types/fq4-cpu.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char * ggml_ext_cpu_paths(void) {
    // Every caller that races here writes the same text.
    static char names[128];
    char        text[sizeof(names)] = "";
    for (int i = 0; i < ggml_ext_fq4_n_paths; i++) {
        if (ggml_ext_fq4_paths[i].available()) {
            const size_t used = strlen(text);
            snprintf(text + used, sizeof(text) - used, "%s%s", used ? "," : "", ggml_ext_fq4_paths[i].name);
        }
    }
    memcpy(names, text, sizeof(names));
    return names;
}

static ggml_ext_fq4_dot_fn find_path(int32_t type, const char * name) {
    for (int i = 0; type == GGML_TYPE_FQ4 && i < ggml_ext_fq4_n_paths; i++) {
        const struct ggml_ext_fq4_path * path = &ggml_ext_fq4_paths[i];
        if (strcmp(path->name, name) == 0 && path->available()) {
            return path->dot;
        }
    }
    return NULL;
}

int32_t ggml_ext_cpu_dot(int32_t type, const char * path, const void * row, const float * x, int64_t n,
                         float * result) {
    const int64_t block = ggml_ext_block_size(type);
    if (block < 0) {
        return GGML_EXT_E_TYPE;
    }
    if (n <= 0 || n % block != 0 || n > INT32_MAX) {
        return GGML_EXT_E_SHAPE;
    }
    ggml_cpu_init();
    const struct ggml_type_traits_cpu * traits = ggml_get_type_traits_cpu((enum ggml_type) type);
    const ggml_ext_fq4_dot_fn           chosen = path ? find_path(type, path) : NULL;
    if (path ? chosen == NULL : traits->vec_dot == NULL) {
        return GGML_EXT_E_TYPE;
    }
    const ggml_from_float_t from_float = ggml_get_type_traits_cpu(traits->vec_dot_type)->from_float;
    if (n % ggml_blck_size(traits->vec_dot_type) != 0) {
        return GGML_EXT_E_SHAPE;
    }
    void * activations = malloc(ggml_row_size(traits->vec_dot_type, n));
    if (activations == NULL) {
        return GGML_EXT_E_MEMORY;
    }
    from_float(x, activations, n);
    if (chosen) {
        *result = chosen((int) (n / QK_FQ4), row, activations);
    } else {
        traits->vec_dot((int) n, result, 0, row, 0, activations, 0, 1);
    }
    free(activations);
    return 0;
}
