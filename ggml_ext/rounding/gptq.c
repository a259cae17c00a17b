// GPTQ and coordinate descent on any grid of levels, see ggml-ext.h and docs/rounding.md.

#include "ggml-ext.h"
#include "rounding.h"

#include <stdlib.h>
#include <string.h>

#define MAX_LEVELS 64

static bool gptq_grid_is_valid(const struct ggml_ext_grid * grid) {
    return grid->n > 0 && grid->group > 0 && grid->n % grid->group == 0 && grid->n_levels >= 2 &&
           grid->n_levels <= MAX_LEVELS && grid->n_books > 0 && grid->n_books <= 256;
}

// The books with the midpoints between their levels; both padded, so that loops over them have a fixed length.
struct gptq_books {
    int64_t n_levels;
    float   value[256][MAX_LEVELS];
    float   middle[256][MAX_LEVELS];  // middle[i]: between levels i and i + 1; INFINITY from the last on
};

static struct gptq_books * gptq_books_new(const struct ggml_ext_grid * grid) {
    struct gptq_books * books = malloc(sizeof(*books));
    if (books == NULL) {
        return NULL;
    }
    books->n_levels = (grid->n_levels + 15) / 16 * 16;
    for (int64_t b = 0; b < grid->n_books; b++) {
        const float * values = grid->books + b * grid->n_levels;
        for (int64_t i = 0; i < MAX_LEVELS; i++) {
            books->value[b][i]  = values[i < grid->n_levels ? i : grid->n_levels - 1];
            books->middle[b][i] = i + 1 < grid->n_levels ? 0.5f * (values[i] + values[i + 1]) : INFINITY;
        }
    }
    return books;
}

// Level nearest to t, the lower one at a tie.
static inline __attribute__((always_inline)) int gptq_nearest(const struct gptq_books * books, int book, float t) {
    const float * middle = books->middle[book];
    int           level  = 0;
    for (int64_t i = 0; i < books->n_levels; i += 16) {
        for (int k = 0; k < 16; k++) {
            level += t > middle[i + k];
        }
    }
    return level;
}

GGML_EXT_CLONES static void gptq_row(const struct ggml_ext_grid * grid, const struct gptq_books * books, int64_t row,
                                     const float * w, const float * u, float * x, uint8_t * levels, float * err,
                                     float * cost) {
    const int64_t n      = grid->n;
    const int64_t groups = n / grid->group;
    float         sum    = 0.0f;
    memcpy(x, w, n * sizeof(float));
    for (int64_t j = 0; j < n; j++) {
        const int64_t g      = row * groups + j / grid->group;
        const float   scale  = grid->scale[g];
        const float   offset = grid->offset[g];
        const int     book   = grid->book[g];
        const int     level  = scale != 0.0f ? gptq_nearest(books, book, (x[j] - offset) / scale) : 0;
        const float * uj     = u + j * n;
        const float   e      = (x[j] - (scale * books->value[book][level] + offset)) / uj[j];
        for (int64_t k = j + 1; k < n; k++) {
            x[k] -= e * uj[k];
        }
        levels[j] = (uint8_t) level;
        err[j]    = e;
        sum += e * e;
    }
    *cost = sum;
}

int32_t ggml_ext_gptq_grid(const struct ggml_ext_grid * grid, int64_t nrows, const float * w, const float * u,
                           uint8_t * levels, float * err, float * cost) {
    if (!gptq_grid_is_valid(grid) || nrows < 0) {
        return GGML_EXT_E_SHAPE;
    }
    const int64_t       n     = grid->n;
    struct gptq_books * books = gptq_books_new(grid);
    float *             x     = malloc(n * sizeof(float));
    if (books == NULL || x == NULL) {
        free(books);
        free(x);
        return GGML_EXT_E_MEMORY;
    }
    for (int64_t row = 0; row < nrows; row++) {
        gptq_row(grid, books, row, w + row * n, u, x, levels + row * n, err + row * n, cost + row);
    }
    free(books);
    free(x);
    return 0;
}

// r = (q - w) h is kept up to date: a change of q_j by s adds s h_j to it.
GGML_EXT_CLONES static int64_t gptq_descend_row(const struct ggml_ext_grid * grid, const struct gptq_books * books,
                                                int64_t row, const float * w, const float * h, int32_t sweeps,
                                                uint8_t * levels, float * q, float * r) {
    const int64_t n      = grid->n;
    const int64_t groups = n / grid->group;
    memset(r, 0, n * sizeof(float));
    for (int64_t j = 0; j < n; j++) {
        const int64_t g  = row * groups + j / grid->group;
        q[j]             = grid->scale[g] * books->value[grid->book[g]][levels[j]] + grid->offset[g];
        const float   d  = q[j] - w[j];
        const float * hj = h + j * n;
        for (int64_t k = 0; k < n; k++) {
            r[k] += d * hj[k];
        }
    }
    int64_t changes = 0;
    for (int32_t sweep = 0; sweep < sweeps; sweep++) {
        const int64_t before = changes;
        for (int64_t j = 0; j < n; j++) {
            const int64_t g     = row * groups + j / grid->group;
            const float   scale = grid->scale[g];
            const float * hj    = h + j * n;
            if (scale == 0.0f || !(hj[j] > 0.0f)) {
                continue;
            }
            const float best  = q[j] - r[j] / hj[j];
            const int   level = gptq_nearest(books, grid->book[g], (best - grid->offset[g]) / scale);
            if (level == levels[j]) {
                continue;
            }
            const float value = scale * books->value[grid->book[g]][level] + grid->offset[g];
            const float step  = value - q[j];
            // The change must gain more than rounding noise, or two levels could alternate for ever.
            if (step * (2.0f * r[j] + step * hj[j]) >= -1e-6f * hj[j] * step * step) {
                continue;
            }
            levels[j] = (uint8_t) level;
            q[j]      = value;
            for (int64_t k = 0; k < n; k++) {
                r[k] += step * hj[k];
            }
            changes++;
        }
        if (changes == before) {
            break;
        }
    }
    return changes;
}

int64_t ggml_ext_descend(const struct ggml_ext_grid * grid, int64_t nrows, const float * w, const float * h,
                         int32_t sweeps, uint8_t * levels) {
    if (!gptq_grid_is_valid(grid) || nrows < 0 || sweeps < 0) {
        return GGML_EXT_E_SHAPE;
    }
    const int64_t       n     = grid->n;
    struct gptq_books * books = gptq_books_new(grid);
    float *             q     = malloc(2 * n * sizeof(float));
    if (books == NULL || q == NULL) {
        free(books);
        free(q);
        return GGML_EXT_E_MEMORY;
    }
    int64_t changes = 0;
    for (int64_t row = 0; row < nrows; row++) {
        changes += gptq_descend_row(grid, books, row, w + row * n, h, sweeps, levels + row * n, q, q + n);
    }
    free(books);
    free(q);
    return changes;
}
