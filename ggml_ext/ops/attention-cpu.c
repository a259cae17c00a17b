// Quantised attention on the CPU: the driver. Work is split by shape alone and merged in a fixed order, so the
// result does not depend on the number of threads.
//
// A task is one kv head of one stream, a block of query tokens and a range of the cache. Where queries are few, the
// range is a chunk of the cache, tasks leave (max, sum, o) and the chunks of a row are merged after a barrier.
// Otherwise it is all of the cache.

#include "attention-cpu.h"

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "ops.h"
#include "override-cpu.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

#define TILE           GGML_EXT_ATTENTION_TILE
#define GROUP          GGML_EXT_ATTENTION_GROUP
#define BATCH          GGML_EXT_ATTENTION_BATCH
#define ROWS_PER_BLOCK 64
#define MAX_HEAD       1024
#define MIN_CHUNK      256
#define MAX_CHUNKS     32
#define LOG2E          1.44269504088896341f
#define ALIGNMENT      64

struct plan {
    struct ggml_ext_attention_dims dims;

    int     dk, dv;
    int     heads;       // query heads per task: those that share a head of K and a head of V
    int64_t n_groups;    // of such heads
    int64_t n_queries;   // query tokens
    int64_t n_streams;   // ne[3] of q
    int64_t n_kv;        // cache tokens
    int64_t block;       // query tokens per task
    int64_t n_blocks;
    int64_t chunk;       // cache tokens per task
    int64_t n_chunks;    // 1: no merging
    int     n_rows;      // of a block, a multiple of BATCH
    float   scale, cap;  // cap 0: none
    float   max_bias;
    bool    smooth;
};

// A thread's memory.
struct scratch {
    struct ggml_ext_attention_tile tile;

    int8_t *             q;          // [n_rows][dk_pad]
    int32_t *            q_start;    // [n_rows][k_groups]
    float *              q_scale;    // [n_rows]
    float *              q_bias;     // [n_rows]
    float *              q_floats;   // [n_rows][dk_pad], scaled, for smoothing
    float *              slope;      // [n_rows]
    const ggml_fp16_t ** mask_rows;  // [n_rows], the whole row or NULL
    const ggml_fp16_t ** mask;       // [n_rows], what a tile needs of it
    float *              max;        // [n_rows]
    float *              sum;        // [n_rows][16]
    float *              o;          // [n_rows][dv_pad]
    bool *               skip;       // [n_rows]
    float *              s;          // [BATCH][64]
    float *              alpha;      // [BATCH]
    float *              gamma;      // [BATCH]
    uint8_t *            p;          // [BATCH][v_groups][planes][64]
};

static size_t take(char ** at, size_t bytes) {
    const size_t size = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    *at += size;
    return size;
}

#define TAKE(pointer, count) (*(void **) &(pointer) = at, take(&at, (size_t) (count) * sizeof(*(pointer))))

// Lays the scratch out from base, which may be NULL, and gives its size.
static size_t lay_out(const struct plan * plan, char * base, struct scratch * out) {
    const struct ggml_ext_attention_dims * d      = &plan->dims;
    const size_t                           pad    = MAX(d->dk_pad, d->dv_pad);
    const size_t                           n_rows = plan->n_rows;
    char *                                 at     = base;
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
    TAKE(out->skip, n_rows);
    TAKE(out->s, BATCH * TILE);
    TAKE(out->alpha, BATCH);
    TAKE(out->gamma, BATCH);
    TAKE(out->p, BATCH * d->v_groups * d->planes * TILE);
    if (!plan->smooth) {
        out->tile.k_mean = NULL;
    }
    return (size_t) (at - base);
}

static int gcd(int64_t a, int64_t b) {
    while (b) {
        const int64_t rest = a % b;
        a                  = b;
        b                  = rest;
    }
    return (int) a;
}

static struct plan make_plan(const struct ggml_tensor * dst) {
    const struct ggml_tensor *              q       = dst->src[0];
    const struct ggml_tensor *              k       = dst->src[1];
    const struct ggml_tensor *              v       = dst->src[2];
    const struct ggml_ext_attention_setting setting = ggml_ext_attention_setting();

    struct plan plan     = { 0 };
    plan.dk              = (int) k->ne[0];
    plan.dv              = (int) v->ne[0];
    plan.smooth          = setting.smooth && k->type == GGML_TYPE_F16;
    plan.dims.dk_pad     = (int) GGML_PAD(k->ne[0], GROUP);
    plan.dims.dv_pad     = (int) GGML_PAD(v->ne[0], GROUP);
    plan.dims.k_groups   = k->type == GGML_TYPE_F16 ? 1 : plan.dims.dk_pad / GROUP;
    plan.dims.v_groups   = v->type == GGML_TYPE_F16 ? 1 : plan.dims.dv_pad / GROUP;
    plan.dims.planes     = setting.mode == GGML_EXT_ATTENTION_HALF ? 2 : 1;
    plan.heads           = gcd(q->ne[2] / k->ne[2], q->ne[2] / v->ne[2]);
    plan.n_groups        = q->ne[2] / plan.heads;
    plan.n_queries       = q->ne[1];
    plan.n_streams       = q->ne[3];
    plan.n_kv            = k->ne[1];
    plan.block           = MIN(plan.n_queries, MAX(1, ROWS_PER_BLOCK / plan.heads));
    plan.n_blocks        = (plan.n_queries + plan.block - 1) / plan.block;
    plan.n_rows          = (int) GGML_PAD(plan.block * plan.heads, BATCH);
    plan.chunk           = plan.n_kv;
    const bool    few    = plan.n_blocks == 1;
    const int64_t shared = GGML_PAD((plan.n_kv + MAX_CHUNKS - 1) / MAX_CHUNKS, TILE);
    if (few) {
        plan.chunk = MIN(plan.n_kv, MAX(MIN_CHUNK, shared));
    }
    plan.n_chunks = (plan.n_kv + plan.chunk - 1) / plan.chunk;
    memcpy(&plan.scale, (const float *) dst->op_params + 0, sizeof(float));
    memcpy(&plan.max_bias, (const float *) dst->op_params + 1, sizeof(float));
    memcpy(&plan.cap, (const float *) dst->op_params + 2, sizeof(float));
    return plan;
}

// --- whether, and how much memory ---

static bool codes(enum ggml_type type) {
    return type == GGML_TYPE_Q8_0 || type == GGML_TYPE_Q4_0 || type == GGML_TYPE_Q5_0 || type == GGML_TYPE_IQ4_NL;
}

// NULL, or why not.
static const char * refusal(const struct ggml_tensor * dst, const struct ggml_ext_attention_setting * setting) {
    const struct ggml_tensor * q     = dst->src[0];
    const struct ggml_tensor * k     = dst->src[1];
    const struct ggml_tensor * v     = dst->src[2];
    const struct ggml_tensor * mask  = dst->src[3];
    const struct ggml_tensor * sinks = dst->src[4];
    const struct ggml_tensor * kv[2] = { k, v };
    for (int i = 0; i < 2; i++) {
        if (kv[i]->type == GGML_TYPE_F16 && !setting->f16) {
            return "one of K and V is f16 (GGML_EXT_ATTN=full/f16 includes it)";
        }
        if (!codes(kv[i]->type) && kv[i]->type != GGML_TYPE_F16) {
            return "the type of K or V";
        }
        if (kv[i]->nb[0] != ggml_type_size(kv[i]->type) || kv[i]->ne[0] > MAX_HEAD) {
            return "the layout of K or V";
        }
        if (q->ne[2] % kv[i]->ne[2] != 0 || q->ne[3] % kv[i]->ne[3] != 0 || kv[i]->ne[1] == 0) {
            return "the shape of K or V";
        }
    }
    if (q->type != GGML_TYPE_F32 || q->nb[0] != sizeof(float) || !ggml_is_contiguous(dst) || ggml_nelements(dst) == 0) {
        return "the layout of Q";
    }
    if (mask && (mask->type != GGML_TYPE_F16 || mask->nb[0] != sizeof(ggml_fp16_t) || mask->ne[0] < k->ne[1])) {
        return "the mask";
    }
    if (sinks && sinks->type != GGML_TYPE_F32) {
        return "the sinks";
    }
    return NULL;
}

static bool applies(const struct ggml_tensor * dst) {
    const struct ggml_ext_attention_setting setting = ggml_ext_attention_setting();
    if (setting.mode == GGML_EXT_ATTENTION_OFF) {
        return false;
    }
    const char * reason = refusal(dst, &setting);
    if (reason == NULL) {
        return true;
    }
    static atomic_flag told      = ATOMIC_FLAG_INIT;
    const bool         quantised = ggml_is_quantized(dst->src[1]->type) || ggml_is_quantized(dst->src[2]->type);
    if (quantised && !atomic_flag_test_and_set(&told)) {
        GGML_LOG_WARN("ggml-ext: attention over K %s [%d] and V %s [%d] is left to llama.cpp's own code: %s\n",
                      ggml_type_name(dst->src[1]->type), (int) dst->src[1]->ne[0], ggml_type_name(dst->src[2]->type),
                      (int) dst->src[2]->ne[0], reason);
    }
    return false;
}

// Merged rows in order of stream, head, query; per chunk: max, sum, o [dv].
static size_t partials_size(const struct plan * plan) {
    const int64_t n_rows = plan->n_streams * plan->n_groups * plan->heads * plan->n_queries;
    return plan->n_chunks > 1 ? sizeof(float) * n_rows * plan->n_chunks * (2 + plan->dv) : 0;
}

static size_t work_size(const struct ggml_tensor * dst, int n_threads) {
    const struct plan plan = make_plan(dst);
    struct scratch    scratch;
    const size_t      ours      = ALIGNMENT + lay_out(&plan, NULL, &scratch) * n_threads + partials_size(&plan);
    // Upstream's row path, for use_ref: three rows and a cache line per thread.
    const size_t      reference = sizeof(float) * (plan.dk + 2 * plan.dv + 64) * n_threads;
    return MAX(ours, reference);
}

// --- one task ---

static float slope_of(const struct plan * plan, int64_t head) {
    if (plan->max_bias <= 0.0f) {
        return 1.0f;
    }
    const uint32_t n_heads = (uint32_t) (plan->n_groups * plan->heads);
    const uint32_t power   = 1u << (uint32_t) floor(log2(n_heads));
    return (uint32_t) head < power ? powf(powf(2.0f, -plan->max_bias / power), (float) (head + 1)) :
                                     powf(powf(2.0f, -plan->max_bias / 2.0f / power), (float) (2 * (head - power) + 1));
}

struct task {
    int64_t stream, group;
    int64_t query, n_queries;
    int64_t begin, end;  // cache tokens
    // What the thread will read next, after all heads of its chunk; empty where that is not known.
    int64_t next_begin, next_end;
};

// Integers, since a comparison of floats would not vectorise.
static bool all_finite(int n, const float * x) {
    uint32_t largest = 0;
    for (int i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof(bits));
        largest = MAX(largest, bits & 0x7fffffff);
    }
    return largest < 0x7f800000;
}

// A query that is not finite has no codes: its row starts, and so ends, as NaN.
static void spoil(const struct plan * plan, struct scratch * w, int row) {
    memset(w->q + (size_t) row * plan->dims.dk_pad, 0, plan->dims.dk_pad);
    w->q_scale[row] = 0.0f;
    for (int i = 0; plan->smooth && i < plan->dk; i++) {
        w->q_floats[(size_t) row * plan->dims.dk_pad + i] = 0.0f;
    }
    for (int i = 0; i < plan->dims.dv_pad; i++) {
        w->o[(size_t) row * plan->dims.dv_pad + i] = NAN;
    }
}

// Row r of a task is query r / heads and head r % heads of the group.
static void load_queries(const struct plan * plan, const struct ggml_ext_attention_path * path,
                         const struct ggml_tensor * dst, const struct task * task, struct scratch * w) {
    const struct ggml_tensor *             q     = dst->src[0];
    const struct ggml_tensor *             mask  = dst->src[3];
    const struct ggml_ext_attention_dims * d     = &plan->dims;
    const int                              width = d->dk_pad / d->k_groups;
    const int                              n     = (int) task->n_queries * plan->heads;
    const float                            scale = plan->cap != 0.0f ? plan->scale / plan->cap : plan->scale * LOG2E;
    memset(w->sum, 0, sizeof(float) * 16 * n);
    memset(w->o, 0, sizeof(float) * d->dv_pad * n);
    for (int r = 0; r < n; r++) {
        const int64_t i1 = task->query + r / plan->heads;
        const int64_t i2 = task->group * plan->heads + r % plan->heads;
        const float * x =
            (const float *) ((const char *) q->data + i1 * q->nb[1] + i2 * q->nb[2] + task->stream * q->nb[3]);
        int8_t * c    = w->q + (size_t) r * d->dk_pad;
        w->q_scale[r] = path->quantize(plan->dk, d->dk_pad, x, c) * scale;
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
        w->slope[r] = slope_of(plan, i2) * LOG2E;
        w->mask_rows[r] =
            mask ? (const ggml_fp16_t *) ((const char *) mask->data + i1 * mask->nb[1] +
                                          i2 % mask->ne[2] * mask->nb[2] + task->stream % mask->ne[3] * mask->nb[3]) :
                   NULL;
        w->max[r] = -INFINITY;
        if (!all_finite(plan->dk, x)) {
            spoil(plan, w, r);
        }
    }
}

// What the mask does to n tokens from t0 on: nothing where all are 0, everything where all are -inf.
// Returns whether any row is left.
static bool look_at_mask(const struct plan * plan, const struct task * task, int64_t t0, int n, struct scratch * w) {
    const int n_rows = (int) task->n_queries * plan->heads;
    bool      any    = false;
    for (int r = 0; r < n_rows; r++) {
        if (r > 0 && w->mask_rows[r] == w->mask_rows[r - 1]) {
            w->mask[r] = w->mask[r - 1];
            w->skip[r] = w->skip[r - 1];
            continue;
        }
        const uint16_t * m    = w->mask_rows[r] ? w->mask_rows[r] + t0 : NULL;
        uint16_t         ones = 0, others = 0;
        for (int t = 0; m && t < n; t++) {
            ones |= m[t];
            others |= m[t] ^ 0xfc00;  // -inf
        }
        w->mask[r] = ones ? m : NULL;
        w->skip[r] = m && !others;
        any |= !w->skip[r];
    }
    return any;
}

// Rows of all heads, or of one, of tokens [begin, end): a head's rows are too far apart for the processor's own
// prefetching.
static void prefetch_rows(const struct ggml_tensor * x, const char * rows, size_t size, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
        const char * row = rows + t * x->nb[1];
        for (size_t at = 0; at < size; at += 64) {
            __builtin_prefetch(row + at, 0, 2);
        }
        __builtin_prefetch(row + size - 1, 0, 2);
    }
}

// Called at tile `tile` of a task. Where a thread takes a chunk's heads one after another, each tile asks for its share
// of the next chunk, all heads, so that every line is asked for once. Otherwise for the next tile's rows of this head.
static void prefetch(const struct plan * plan, const struct task * task, const struct ggml_tensor * x,
                     const char * head_rows, int64_t t0) {
    if (task->next_begin == task->next_end) {
        const int64_t end = MIN(t0 + 2 * TILE, task->end);
        prefetch_rows(x, head_rows, ggml_row_size(x->type, x->ne[0]), t0 + TILE, end);
        return;
    }
    const int64_t n_tiles = (task->end - task->begin + TILE - 1) / TILE;
    const int64_t n_steps = n_tiles * plan->n_groups;
    const int64_t step    = task->group * n_tiles + (t0 - task->begin) / TILE;
    const int64_t n       = task->next_end - task->next_begin;
    const char *  rows    = (const char *) x->data + task->stream / (plan->n_streams / x->ne[3]) * x->nb[3];
    prefetch_rows(x, rows, x->ne[2] * x->nb[2], task->next_begin + n * step / n_steps,
                  task->next_begin + n * (step + 1) / n_steps);
}

static void add_mean(const struct plan * plan, const struct scratch * w, int row, int n_rows) {
    for (int r = row; r < row + n_rows; r++) {
        float sum = 0.0f;
        for (int i = 0; i < plan->dk; i++) {
            sum += w->q_floats[(size_t) r * plan->dims.dk_pad + i] * w->tile.k_mean[i];
        }
        w->q_bias[r] = sum;
    }
}

static void attend(const struct plan * plan, const struct ggml_ext_attention_path * path,
                   const struct ggml_tensor * dst, const struct task * task, struct scratch * w) {
    const struct ggml_tensor *             q = dst->src[0];
    const struct ggml_tensor *             k = dst->src[1];
    const struct ggml_tensor *             v = dst->src[2];
    const struct ggml_ext_attention_dims * d = &plan->dims;

    const int64_t head   = task->group * plan->heads;
    const char *  k_rows = (const char *) k->data + head / (q->ne[2] / k->ne[2]) * k->nb[2] +
                          task->stream / (q->ne[3] / k->ne[3]) * k->nb[3];
    const char * v_rows = (const char *) v->data + head / (q->ne[2] / v->ne[2]) * v->nb[2] +
                          task->stream / (q->ne[3] / v->ne[3]) * v->nb[3];
    const float levels = d->planes == 2 ? 65535.0f : 255.0f;
    const int   n_rows = (int) task->n_queries * plan->heads;

    load_queries(plan, path, dst, task, w);
    for (int64_t t0 = task->begin; t0 < task->end; t0 += TILE) {
        const int n = (int) MIN(TILE, task->end - t0);
        if (!look_at_mask(plan, task, t0, n, w)) {
            continue;
        }
        prefetch(plan, task, k, k_rows, t0);
        prefetch(plan, task, v, v_rows, t0);
        ggml_ext_attention_load_k(path, k->type, plan->dk, n, k_rows + t0 * k->nb[1], k->nb[1], &w->tile);
        ggml_ext_attention_load_v(path, v->type, plan->dv, n, v_rows + t0 * v->nb[1], v->nb[1], levels, &w->tile);
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
                add_mean(plan, w, row, count);
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
                path->softcap(count * TILE, plan->cap * LOG2E, w->s);
            }
            path->weights(d, &w->tile, n, &rows);
            path->accumulate(d, &w->tile, &rows);
        }
    }
}

// --- results ---

static float sum16(const float * x) {
    float sum = 0.0f;
    for (int i = 0; i < 16; i++) {
        sum += x[i];
    }
    return sum;
}

static void write_row(const struct plan * plan, struct ggml_tensor * dst, int64_t stream, int64_t query, int64_t head,
                      float max, float sum, const float * o) {
    const struct ggml_tensor * sinks = dst->src[4];
    float                      scale = 1.0f;
    if (sinks) {
        const float sink    = ((const float *) sinks->data)[head] * LOG2E;
        const float new_max = MAX(max, sink);
        scale               = exp2f(max - new_max);
        sum                 = sum * scale + exp2f(sink - new_max);
    }
    scale = sum == 0.0f ? 0.0f : scale / sum;
    float * out =
        (float *) ((char *) dst->data + ((stream * plan->n_queries + query) * dst->ne[1] + head) * dst->nb[1]);
    for (int i = 0; i < plan->dv; i++) {
        out[i] = o[i] * scale;
    }
}

static float * partial_of(const struct plan * plan, float * partials, int64_t row, int64_t chunk) {
    return partials + (row * plan->n_chunks + chunk) * (2 + plan->dv);
}

static void store(const struct plan * plan, struct ggml_tensor * dst, const struct task * task,
                  const struct scratch * w, float * partials) {
    for (int r = 0; r < task->n_queries * plan->heads; r++) {
        const int64_t query = task->query + r / plan->heads;
        const int64_t head  = task->group * plan->heads + r % plan->heads;
        const float   sum   = sum16(w->sum + (size_t) r * 16);
        const float * o     = w->o + (size_t) r * plan->dims.dv_pad;
        if (plan->n_chunks == 1) {
            write_row(plan, dst, task->stream, query, head, w->max[r], sum, o);
            continue;
        }
        const int64_t row = (task->stream * plan->n_groups * plan->heads + head) * plan->n_queries + query;
        float *       out = partial_of(plan, partials, row, task->begin / plan->chunk);
        out[0]            = w->max[r];
        out[1]            = sum;
        memcpy(out + 2, o, sizeof(float) * plan->dv);
    }
}

// Merges a row's chunks in ascending order into the first one and writes the row.
static void merge(const struct plan * plan, struct ggml_tensor * dst, int64_t row, float * partials) {
    float * into = partial_of(plan, partials, row, 0);
    for (int64_t chunk = 1; chunk < plan->n_chunks; chunk++) {
        const float * from = partial_of(plan, partials, row, chunk);
        const float   max  = MAX(into[0], from[0]);
        if (from[1] == 0.0f) {
            continue;
        }
        const float old_scale = exp2f(into[0] - max);
        const float new_scale = exp2f(from[0] - max);
        into[0]               = max;
        for (int i = 1; i < 2 + plan->dv; i++) {
            into[i] = into[i] * old_scale + from[i] * new_scale;
        }
    }
    const int64_t n_heads = plan->n_groups * plan->heads;
    write_row(plan, dst, row / plan->n_queries / n_heads, row % plan->n_queries, row / plan->n_queries % n_heads,
              into[0], into[1], into + 2);
}

// --- all tasks ---

static void tell_once(const struct ggml_tensor * dst, const struct ggml_ext_attention_path * path) {
    static atomic_flag told = ATOMIC_FLAG_INIT;
    if (!atomic_flag_test_and_set(&told)) {
        GGML_LOG_INFO("ggml-ext: attention over K %s and V %s in 8-bit integers (%s weights, %s); GGML_EXT_ATTN=off "
                      "switches it off\n",
                      ggml_type_name(dst->src[1]->type), ggml_type_name(dst->src[2]->type),
                      ggml_ext_attention_setting().mode == GGML_EXT_ATTENTION_HALF ? "16-bit" : "8-bit", path->name);
    }
}

static const struct ggml_ext_attention_path * fastest(void) {
    const struct ggml_ext_attention_path * const * path = ggml_ext_attention_paths;
    while (!(*path)->available()) {
        path++;
    }
    return *path;
}

static struct task task_of(const struct plan * plan, int64_t i) {
    const int64_t chunk = i / plan->n_groups % plan->n_chunks;
    const int64_t block = i / plan->n_groups / plan->n_chunks % plan->n_blocks;
    return (struct task) {
        .stream    = i / plan->n_groups / plan->n_chunks / plan->n_blocks,
        .group     = i % plan->n_groups,
        .query     = block * plan->block,
        .n_queries = MIN(plan->block, plan->n_queries - block * plan->block),
        .begin     = chunk * plan->chunk,
        .end       = MIN(plan->n_kv, (chunk + 1) * plan->chunk),
    };
}

static void compute(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    if (params->use_ref) {
        ggml_compute_forward_flash_attn_ext(params, dst);
        return;
    }
    const struct plan                      plan = make_plan(dst);
    const struct ggml_ext_attention_path * path = fastest();
    struct scratch                         scratch;

    char *       base     = (char *) GGML_PAD((uintptr_t) params->wdata, ALIGNMENT);
    const size_t size     = lay_out(&plan, NULL, &scratch);
    float *      partials = (float *) (base + size * params->nth);
    lay_out(&plan, base + size * params->ith, &scratch);

    if (params->ith == 0) {
        tell_once(dst, path);
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    // A unit is what a thread takes at once: a task, or with enough chunks all heads of a chunk, whose cache rows are
    // adjacent. It does not matter to the result.
    const struct ggml_tensor * k        = dst->src[1];
    const bool                 adjacent = k->nb[2] < k->nb[1];
    const int64_t              n_ranges = plan.n_streams * plan.n_blocks * plan.n_chunks;  // groups come fastest
    const bool                 whole    = plan.n_chunks > 1 && adjacent && n_ranges >= 4 * (int64_t) params->nth;
    const int64_t              n_units  = whole ? n_ranges : n_ranges * plan.n_groups;
    for (int64_t unit = params->ith, next; unit < n_units; unit = next) {
        next                = ggml_threadpool_chunk_add(params->threadpool, 1);
        const int64_t first = whole ? unit * plan.n_groups : unit;
        const int64_t end   = whole ? first + plan.n_groups : unit + 1;
        for (int64_t i = first; i < end; i++) {
            struct task task = task_of(&plan, i);
            if (whole && next < n_units) {
                const struct task after = task_of(&plan, next * plan.n_groups);
                if (after.stream == task.stream) {
                    task.next_begin = after.begin;
                    task.next_end   = after.end;
                }
            }
            attend(&plan, path, dst, &task, &scratch);
            store(&plan, dst, &task, &scratch, partials);
        }
    }
    if (plan.n_chunks == 1) {
        return;
    }
    ggml_barrier(params->threadpool);
    const int64_t n_rows = plan.n_streams * plan.n_groups * plan.heads * plan.n_queries;
    for (int64_t row = params->ith; row < n_rows; row += params->nth) {
        merge(&plan, dst, row, partials);
    }
}

const struct ggml_ext_cpu_override ggml_ext_cpu_attention = { applies, work_size, compute };
