// The public API of ggml-ext.h that lives in ggml-cpu.

#include "fq4/cpu/fq4.h"
#include "ggml-cpu.h"
#include "ggml-ext.h"
#include "ggml-impl.h"
#include "ggml-threading.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char * ggml_ext_cpu_paths(void) {
    static char names[128] = "";
    ggml_critical_section_start();
    const bool first = names[0] == '\0';
    for (int i = 0; i < ggml_ext_fq4_kernels.n_paths && first; i++) {
        const struct ggml_ext_fq4_path * path = ggml_ext_fq4_kernels.paths[i];
        if (path->available()) {
            const size_t length = strlen(names);
            snprintf(names + length, sizeof(names) - length, "%s%s", length ? "," : "", path->name);
        }
    }
    ggml_critical_section_end();
    return names;
}

// The named path, the fastest for NULL; NULL for a name that this processor has not.
static const struct ggml_ext_fq4_path * find_path(const struct ggml_ext_fq4_kind * kind, const char * name) {
    if (name == NULL) {
        return ggml_ext_fq4_fastest(kind);
    }
    for (int i = 0; i < kind->n_paths; i++) {
        const struct ggml_ext_fq4_path * path = kind->paths[i];
        if (strcmp(path->name, name) == 0 && path->available()) {
            return path;
        }
    }
    return NULL;
}

static int32_t fq4_dot(const struct ggml_ext_fq4_kind * kind, const char * name, const void * row, const float * x,
                       int64_t n, float * result) {
    const struct ggml_ext_fq4_path * path = find_path(kind, name);
    if (path == NULL) {
        return GGML_EXT_E_TYPE;
    }
    const size_t size        = n / kind->block * kind->act_size;
    void *       activations = ggml_aligned_malloc(size);
    if (activations == NULL) {
        return GGML_EXT_E_MEMORY;
    }
    const void * column = activations;
    path->quantize(n, x, activations);
    path->dots(1, (int) (n / kind->block), row, 0, 1, &column, &result);
    ggml_aligned_free(activations, size);
    return 0;
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
    const struct ggml_ext_fq4_kind * kind = ggml_ext_fq4_kind_of((enum ggml_type) type);
    if (kind != NULL) {
        return fq4_dot(kind, path, row, x, n, result);
    }
    const struct ggml_type_traits_cpu * traits = ggml_get_type_traits_cpu((enum ggml_type) type);
    if (path != NULL || traits->vec_dot == NULL) {
        return GGML_EXT_E_TYPE;
    }
    if (n % ggml_blck_size(traits->vec_dot_type) != 0) {
        return GGML_EXT_E_SHAPE;
    }
    void * activations = malloc(ggml_row_size(traits->vec_dot_type, n));
    if (activations == NULL) {
        return GGML_EXT_E_MEMORY;
    }
    ggml_get_type_traits_cpu(traits->vec_dot_type)->from_float(x, activations, n);
    traits->vec_dot((int) n, result, 0, row, 0, activations, 0, 1);
    free(activations);
    return 0;
}
