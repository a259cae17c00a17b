// Quantised attention on the CPU: the layout of work and memory, and one task.

#include "task.h"

#include "ggml-impl.h"

#include <math.h>
#include <string.h>

#define TILE           GGML_EXT_ATTENTION_TILE
#define GROUP          GGML_EXT_ATTENTION_GROUP
#define BATCH          GGML_EXT_ATTENTION_BATCH
#define ROWS_PER_BLOCK 64  // 128 measured 7 % slower
#define MIN_CHUNK      256
#define MAX_CHUNKS     32
#define MASKED         0xfc00  // -inf in f16

// --- layout ---

static void * attention_carve(char * base, size_t * used, size_t bytes) {
    char * const at = base ? base + *used : NULL;
    *used += (bytes + GGML_EXT_ATTENTION_ALIGNMENT - 1) / GGML_EXT_ATTENTION_ALIGNMENT * GGML_EXT_ATTENTION_ALIGNMENT;
    return at;
}

#define TAKE(pointer, count) ((pointer) = attention_carve(base, &used, (size_t) (count) * sizeof(*(pointer))))

size_t ggml_ext_attention_lay_out(const struct ggml_ext_attention_plan * plan, char * base,
                                  struct ggml_ext_attention_scratch * out) {
    const struct ggml_ext_attention_dims * d      = &plan->dims;
    const size_t                           pad    = MAX(d->dk_pad, d->dv_pad);
    const size_t                           n_rows = plan->n_rows;
    size_t                                 used   = 0;
    TAKE(out->tile.k, d->dk_pad * TILE);
    TAKE(out->tile.k_scale, d->dk_pad / GROUP * TILE);
    TAKE(out->tile.k_mean, d->dk_pad);
    TAKE(out->tile.v, d->dv_pad * TILE);
    TAKE(out->tile.v_level, d->dv_pad / GROUP * TILE);
    TAKE(out->tile.v_unit, d->dv_pad / GROUP);
    TAKE(out->tile.staging, TILE * pad + TILE * pad / GROUP);
    TAKE(out->tile.floats, TILE * pad);
    TAKE(out->q, n_rows * d->dk_pad);
    TAKE(out->q_start, n_rows * d->k_groups);
    TAKE(out->q_scale, n_rows);
    TAKE(out->q_bias, n_rows);
    TAKE(out->q_floats, plan->smooth ? n_rows * d->dk_pad : 0);
    TAKE(out->slope, n_rows);
    TAKE(out->mask_rows, n_rows);
    TAKE(out->mask, n_rows);
    TAKE(out->max, n_rows);
    TAKE(out->sum, n_rows * 16);
    TAKE(out->o, n_rows * d->dv_pad);
    TAKE(out->gathered, n_rows * TILE);
    TAKE(out->skip, n_rows);
    TAKE(out->s, BATCH * TILE);
    TAKE(out->alpha, BATCH);
    TAKE(out->gamma, BATCH);
    TAKE(out->p, BATCH * d->v_groups * d->planes * TILE);
    if (!plan->smooth) {
        out->tile.k_mean = NULL;
    }
    return used;
}

static int attention_gcd(int64_t a, int64_t b) {
    while (b) {
        const int64_t rest = a % b;
        a                  = b;
        b                  = rest;
    }
    return (int) a;
}

struct ggml_ext_attention_plan ggml_ext_attention_make_plan(const struct ggml_ext_attention_shape * shape) {
    const struct ggml_ext_attention_setting setting = ggml_ext_attention_setting();

    struct ggml_ext_attention_plan plan = { 0 };
    plan.type_k                         = shape->type_k;
    plan.type_v                         = shape->type_v;
    plan.dk                             = shape->dk;
    plan.dv                             = shape->dv;
    plan.smooth                         = setting.smooth && shape->type_k == GGML_TYPE_F16;
    plan.dims.dk_pad                    = (int) GGML_PAD(shape->dk, GROUP);
    plan.dims.dv_pad                    = (int) GGML_PAD(shape->dv, GROUP);
    plan.dims.k_groups                  = shape->type_k == GGML_TYPE_F16 ? 1 : plan.dims.dk_pad / GROUP;
    plan.dims.v_groups                  = shape->type_v == GGML_TYPE_F16 ? 1 : plan.dims.dv_pad / GROUP;
    plan.dims.planes                    = setting.mode == GGML_EXT_ATTENTION_FULL ? 1 : 2;
    plan.heads           = attention_gcd(shape->n_head / shape->n_head_k, shape->n_head / shape->n_head_v);
    plan.n_groups        = shape->n_head / plan.heads;
    plan.n_queries       = shape->n_queries;
    plan.n_streams       = shape->n_streams;
    plan.n_kv            = shape->n_kv;
    const int rows       = shape->rows > 0 ? shape->rows : ROWS_PER_BLOCK;
    plan.block           = MIN(plan.n_queries, MAX(1, rows / plan.heads));
    plan.n_blocks        = (plan.n_queries + plan.block - 1) / plan.block;
    plan.n_rows          = (int) GGML_PAD(plan.block * plan.heads, BATCH);
    const int64_t n_keys = shape->n_keys > 0 ? MIN(shape->n_keys, plan.n_kv) : plan.n_kv;
    plan.chunk           = n_keys;
    const bool    few    = plan.n_queries <= MAX(1, ROWS_PER_BLOCK / plan.heads);
    const int64_t shared = GGML_PAD((n_keys + MAX_CHUNKS - 1) / MAX_CHUNKS, TILE);
    if (few) {
        plan.chunk = MIN(n_keys, MAX(MIN_CHUNK, shared));
    }
    plan.n_chunks = (n_keys + plan.chunk - 1) / plan.chunk;
    plan.scale    = shape->scale;
    plan.max_bias = shape->max_bias;
    plan.cap      = shape->cap;
    return plan;
}

// --- one task ---

static float attention_slope_of(const struct ggml_ext_attention_plan * plan, int64_t head) {
    if (plan->max_bias <= 0.0f) {
        return 1.0f;
    }
    const uint32_t n_heads = (uint32_t) (plan->n_groups * plan->heads);
    const uint32_t power   = 1u << (uint32_t) floor(log2(n_heads));
    return (uint32_t) head < power ? powf(powf(2.0f, -plan->max_bias / power), (float) (head + 1)) :
                                     powf(powf(2.0f, -plan->max_bias / 2.0f / power), (float) (2 * (head - power) + 1));
}

// A query that is not finite has no codes: its row starts, and so ends, as NaN.
static void attention_poison(const struct ggml_ext_attention_plan * plan, struct ggml_ext_attention_scratch * w,
                             int row) {
    w->q_scale[row] = 0.0f;
    for (int i = 0; plan->smooth && i < plan->dk; i++) {
        w->q_floats[(size_t) row * plan->dims.dk_pad + i] = 0.0f;
    }
    for (int i = 0; i < plan->dims.dv_pad; i++) {
        w->o[(size_t) row * plan->dims.dv_pad + i] = NAN;
    }
}

void ggml_ext_attention_load_queries(const struct ggml_ext_attention_plan * plan,
                                     const struct ggml_ext_attention_path * path, const struct ggml_tensor * q,
                                     const struct ggml_tensor * mask, const struct ggml_ext_attention_task * task,
                                     struct ggml_ext_attention_scratch * w) {
    const struct ggml_ext_attention_dims * d     = &plan->dims;
    const int                              width = d->dk_pad / d->k_groups;
    const int                              n     = (int) task->n_queries * plan->heads;
    const float scale = plan->cap != 0.0f ? plan->scale / plan->cap : plan->scale * GGML_EXT_LOG2E;
    memset(w->sum, 0, sizeof(float) * 16 * n);
    memset(w->o, 0, sizeof(float) * d->dv_pad * n);
    for (int r = 0; r < n; r++) {
        const int64_t token = ggml_ext_attention_token(plan, task, r / plan->heads);
        const int64_t i1    = token % plan->n_queries;
        const int64_t i2    = task->group * plan->heads + r % plan->heads;
        const int64_t i3    = token / plan->n_queries;
        const float * x     = (const float *) ((const char *) q->data + i1 * q->nb[1] + i2 * q->nb[2] + i3 * q->nb[3]);
        int8_t *      c     = w->q + (size_t) r * d->dk_pad;
        const float   unit  = path->quantize(plan->dk, d->dk_pad, x, c);
        w->q_scale[r]       = unit * scale;
        for (int g = 0; g < d->k_groups; g++) {
            int32_t sum = 0;
            for (int i = 0; i < width; i++) {
                sum += c[g * width + i];
            }
            w->q_start[r * d->k_groups + g] = -128 * sum;
        }
        if (plan->smooth) {
            for (int i = 0; i < plan->dk; i++) {
                w->q_floats[(size_t) r * d->dk_pad + i] = x[i] * scale;
            }
        }
        w->slope[r]     = attention_slope_of(plan, i2) * GGML_EXT_LOG2E;
        w->mask_rows[r] = mask ?
                              (const ggml_fp16_t *) ((const char *) mask->data + i1 * mask->nb[1] +
                                                     i2 % mask->ne[2] * mask->nb[2] + i3 % mask->ne[3] * mask->nb[3]) :
                              NULL;
        w->max[r]       = -INFINITY;
        if (isnan(unit)) {
            attention_poison(plan, w, r);
        }
    }
}

// A span's columns of row r of the mask, adjacent; NULL where there is no mask.
static const ggml_fp16_t * attention_columns(const struct ggml_ext_attention_span * span, int r,
                                             struct ggml_ext_attention_scratch * w) {
    const ggml_fp16_t * row = w->mask_rows[r];
    if (row == NULL || span->columns == NULL) {
        return row ? row + span->column : NULL;
    }
    ggml_fp16_t * gathered = w->gathered + (size_t) r * TILE;
    for (int t = 0; t < span->n; t++) {
        gathered[t] = row[span->columns[t]];
    }
    return gathered;
}

// What the mask does to a span: nothing where all are 0, everything where all are -inf. Returns whether any row is left.
static bool attention_read_mask(int n_rows, const struct ggml_ext_attention_span * span,
                                struct ggml_ext_attention_scratch * w) {
    bool any = false;
    for (int r = 0; r < n_rows; r++) {
        if (r > 0 && w->mask_rows[r] == w->mask_rows[r - 1]) {
            w->mask[r] = w->mask[r - 1];
            w->skip[r] = w->skip[r - 1];
            continue;
        }
        const uint16_t * m    = attention_columns(span, r, w);
        uint16_t         ones = 0, others = 0;
        for (int t = 0; m && t < span->n; t++) {
            ones |= m[t];
            others |= m[t] ^ MASKED;
        }
        w->mask[r] = ones ? m : NULL;
        w->skip[r] = m && !others;
        any |= !w->skip[r];
    }
    return any;
}

// A token whose scale is NaN or Inf makes the rows that see it NaN, as in upstream's code.
static void attention_poison_rows(int n, int n_rows, struct ggml_ext_attention_scratch * w) {
    for (int r = 0; r < n_rows; r++) {
        const uint16_t * mask = w->mask[r];
        for (int t = 0; t < n; t++) {
            if (w->tile.poisoned >> t & 1 && !(mask && mask[t] == MASKED)) {
                w->sum[(size_t) r * 16] = NAN;
            }
        }
    }
}

static void attention_add_mean(const struct ggml_ext_attention_plan * plan, const struct ggml_ext_attention_scratch * w,
                               int row, int n_rows) {
    for (int r = row; r < row + n_rows; r++) {
        float sum = 0.0f;
        for (int i = 0; i < plan->dk; i++) {
            sum += w->q_floats[(size_t) r * plan->dims.dk_pad + i] * w->tile.k_mean[i];
        }
        w->q_bias[r] = sum;
    }
}

// Weights that accumulate does not see have the resolution of the planes.
static void attention_level(const struct ggml_ext_attention_plan * plan, float levels,
                            struct ggml_ext_attention_scratch * w) {
    for (int i = 0; i < plan->dims.v_groups * TILE; i++) {
        w->tile.v_level[i] = levels;
    }
}

void ggml_ext_attention_weigh(const struct ggml_ext_attention_plan * plan, const struct ggml_ext_attention_path * path,
                              const struct ggml_ext_attention_task *  task,
                              const struct ggml_ext_attention_tiles * tiles, const struct ggml_ext_attention_use * use,
                              struct ggml_ext_attention_scratch * w) {
    const struct ggml_ext_attention_dims * d = &plan->dims;

    const float levels = d->planes == 2 ? 65535.0f : 255.0f;
    const int   n_rows = (int) task->n_queries * plan->heads;

    if (!use->values) {
        attention_level(plan, levels, w);
    }
    for (int64_t i = 0; i < tiles->n; i++) {
        const struct ggml_ext_attention_span span = tiles->span(tiles->cache, task, i);
        if (!attention_read_mask(n_rows, &span, w)) {
            continue;
        }
        if (tiles->prefetch) {
            tiles->prefetch(tiles->cache, task, i);
        }
        ggml_ext_attention_load_k(path, plan->type_k, plan->dk, span.n, span.k, span.k_stride, &w->tile);
        if (use->values) {
            ggml_ext_attention_load_v(path, plan->type_v, plan->dv, span.n, span.v, span.v_stride, levels, &w->tile);
        }
        if (w->tile.poisoned) {
            attention_poison_rows(span.n, n_rows, w);
        }
        for (int row = 0; row < n_rows; row += BATCH) {
            const int count = MIN(BATCH, n_rows - row);
            bool      skip  = true;
            for (int r = row; r < row + count; r++) {
                skip &= w->skip[r];
            }
            if (skip) {
                continue;
            }
            if (plan->smooth) {
                attention_add_mean(plan, w, row, count);
            }
            const struct ggml_ext_attention_rows rows = {
                .n_rows  = count,
                .q       = w->q + (size_t) row * d->dk_pad,
                .q_start = w->q_start + (size_t) row * d->k_groups,
                .q_scale = w->q_scale + row,
                .q_bias  = plan->smooth ? w->q_bias + row : NULL,
                .s       = w->s,
                .mask    = w->mask + row,
                .slope   = w->slope + row,
                .p       = w->p,
                .max     = w->max + row,
                .sum     = w->sum + (size_t) row * 16,
                .alpha   = w->alpha,
                .gamma   = w->gamma,
                .o       = w->o + (size_t) row * d->dv_pad,
            };
            path->scores(d, &w->tile, &rows);
            if (plan->cap != 0.0f) {
                path->softcap(count * TILE, plan->cap * GGML_EXT_LOG2E, w->s);
            }
            path->weights(d, &w->tile, span.n, &rows);
            use->batch(use, plan, path, &w->tile, &rows, i, row);
        }
    }
}

static void attention_accumulate(const struct ggml_ext_attention_use * use, const struct ggml_ext_attention_plan * plan,
                                 const struct ggml_ext_attention_path * path,
                                 const struct ggml_ext_attention_tile * tile,
                                 const struct ggml_ext_attention_rows * rows, int64_t i, int row) {
    path->accumulate(&plan->dims, tile, rows);
    GGML_UNUSED(use);
    GGML_UNUSED(i);
    GGML_UNUSED(row);
}

void ggml_ext_attention_attend(const struct ggml_ext_attention_plan * plan, const struct ggml_ext_attention_path * path,
                               const struct ggml_tensor * q, const struct ggml_tensor * mask,
                               const struct ggml_ext_attention_task *  task,
                               const struct ggml_ext_attention_tiles * tiles, struct ggml_ext_attention_scratch * w) {
    const struct ggml_ext_attention_use use = { .batch = attention_accumulate, .values = true };
    ggml_ext_attention_load_queries(plan, path, q, mask, task, w);
    ggml_ext_attention_weigh(plan, path, task, tiles, &use, w);
}
