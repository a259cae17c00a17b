// MUL_MAT and MUL_MAT_ID with weights of the types with FQ4's table. The columns of src1 are rounded to int8 once; then threads work through
// pieces: a few rows times all columns of a group where columns are few (the weights are read once, at the speed of
// memory), else a tile of rows, decoded once per block and multiplied with all columns.
//
// A group is a set of columns that are multiplied with the same weights: one matrix of src1's batch, or an expert's
// tokens. Pieces are numbered group by group. Each thread has a range of them, one stream of weights from memory, and
// then helps the others with theirs.

#include "core/cpu/override.h"
#include "fq4.h"
#include "ggml-cpu-impl.h"
#include "ggml-impl.h"

#include <stdalign.h>
#include <stdatomic.h>
#include <string.h>

#define FEW_COLS GGML_EXT_FQ4_MAX_COLS  // up to so many columns a row's dot products beat the tiles
#define ROWS     GGML_EXT_FQ4_TILE_ROWS
#define FEW_ROWS 16                     // rows of a piece where columns are few
#define CHUNK_COLS \
    512  // columns that a tile is multiplied with at a time: bounds the sums' buffer to 64 KiB per thread
#define ALIGN 64

// Per thread.
struct fq4_scratch {
    struct ggml_ext_fq4_tile tile;  // room for any type's
    float                    acc[CHUNK_COLS * ROWS];
};

// The pieces of a thread that nobody has taken yet; a cache line each.
struct fq4_range {
    alignas(ALIGN) atomic_int_fast64_t next;
    int64_t end;
};

// Where things lie in the work buffer, as offsets from its first aligned byte.
struct fq4_layout {
    size_t acts;     // rounded columns, ne10 / block of the type's activations each
    size_t first;    // MUL_MAT_ID: int32 [n_experts + 1], where an expert's columns start in `columns`
    size_t columns;  // MUL_MAT_ID: int32 [n_used * n_tokens], columns of dst, by expert
    size_t ranges;   // struct fq4_range [n_threads]
    size_t scratch;  // struct fq4_scratch [n_threads]
    size_t end;
};

static size_t fq4_place(size_t * at, size_t size) {
    const size_t start = *at;
    *at                = GGML_PAD(start + size, ALIGN);
    return start;
}

static const struct ggml_ext_fq4_kind * fq4_kind(const struct ggml_tensor * dst) {
    return ggml_ext_fq4_kind_of(dst->src[0]->type);
}

// Bytes of a rounded column.
static size_t fq4_act_size(const struct ggml_tensor * dst) {
    return dst->src[0]->ne[0] / fq4_kind(dst)->block * fq4_kind(dst)->act_size;
}

static struct fq4_layout fq4_make_layout(const struct ggml_tensor * dst, int n_threads) {
    const struct ggml_tensor * src0 = dst->src[0];
    const struct ggml_tensor * src1 = dst->src[1];
    const bool                 id   = dst->op == GGML_OP_MUL_MAT_ID;
    struct fq4_layout          l;
    size_t                     at = 0;
    l.acts                        = fq4_place(&at, ggml_nrows(src1) * fq4_act_size(dst));
    l.first                       = fq4_place(&at, id ? (src0->ne[2] + 1) * sizeof(int32_t) : 0);
    l.columns                     = fq4_place(&at, id ? ggml_nelements(dst->src[2]) * sizeof(int32_t) : 0);
    l.ranges                      = fq4_place(&at, n_threads * sizeof(struct fq4_range));
    l.scratch                     = fq4_place(&at, n_threads * sizeof(struct fq4_scratch));
    l.end                         = at + ALIGN;
    return l;
}

static bool fq4_applies(const struct ggml_tensor * dst) {
    const struct ggml_tensor * src1 = dst->src[1];
    return fq4_kind(dst) != NULL && src1->type == GGML_TYPE_F32 && src1->nb[0] == sizeof(float) &&
           dst->type == GGML_TYPE_F32 && dst->nb[0] == sizeof(float);
}

static size_t fq4_work_size(const struct ggml_tensor * dst, int n_threads) {
    return fq4_make_layout(dst, n_threads).end;
}

struct fq4_work {
    const struct ggml_ext_fq4_kind * kind;
    const struct ggml_ext_fq4_path * path;
    const struct ggml_tensor *       dst;
    char *                           acts;
    size_t                           act_size;  // bytes of a rounded column
    const int32_t *                  first;     // of MUL_MAT_ID, else NULL
    const int32_t *                  columns;
    struct fq4_scratch *             scratch;
};

static void fq4_round_columns(const struct fq4_work * w, const struct ggml_compute_params * params) {
    const struct ggml_tensor * src1     = w->dst->src[1];
    const int64_t              n_blocks = src1->ne[0] / w->kind->block;
    const int64_t              total    = n_blocks * ggml_nrows(src1);
    const int64_t              end      = total * (params->ith + 1) / params->nth;
    for (int64_t i = total * params->ith / params->nth; i < end;) {
        const int64_t column = i / n_blocks;
        const int64_t block  = i % n_blocks;
        const int64_t count  = MIN(n_blocks - block, end - i);
        const int64_t i1     = column % src1->ne[1];
        const int64_t i2     = column / src1->ne[1] % src1->ne[2];
        const int64_t i3     = column / (src1->ne[1] * src1->ne[2]);
        const char *  x      = (const char *) src1->data + i1 * src1->nb[1] + i2 * src1->nb[2] + i3 * src1->nb[3];
        w->path->quantize(count * w->kind->block, (const float *) x + block * w->kind->block,
                          w->acts + column * w->act_size + block * w->kind->act_size);
        i += count;
    }
}

// Sorts the columns of dst (token * n_used + slot) by expert.
static void fq4_group_by_expert(const struct ggml_tensor * dst, int32_t * first, int32_t * columns) {
    const struct ggml_tensor * ids       = dst->src[2];
    const int64_t              n_experts = dst->src[0]->ne[2];
    const int64_t              n_used    = ids->ne[0];
    memset(first, 0, (n_experts + 1) * sizeof(int32_t));
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t token = 0; token < ids->ne[1]; token++) {
            for (int64_t slot = 0; slot < n_used; slot++) {
                const int32_t expert =
                    *(const int32_t *) ((const char *) ids->data + token * ids->nb[1] + slot * ids->nb[0]);
                GGML_ASSERT(expert >= 0 && expert < n_experts);
                if (pass == 0) {
                    first[expert + 1]++;
                } else {
                    columns[first[expert]++] = (int32_t) (token * n_used + slot);
                }
            }
        }
        if (pass == 0) {
            for (int64_t e = 0; e < n_experts; e++) {
                first[e + 1] += first[e];
            }
        }
    }
    // The second pass moved each start to its group's end.
    memmove(first + 1, first, n_experts * sizeof(int32_t));
    first[0] = 0;
}

struct fq4_group {
    const char *    weights;
    int64_t         n_cols;
    const int32_t * columns;  // of MUL_MAT_ID, else NULL
    int64_t         index;    // of MUL_MAT: the matrix in dst's batch
};

static int64_t fq4_n_groups(const struct fq4_work * w) {
    return w->first ? w->dst->src[0]->ne[2] : w->dst->ne[2] * w->dst->ne[3];
}

static struct fq4_group fq4_get_group(const struct fq4_work * w, int64_t i) {
    const struct ggml_tensor * dst  = w->dst;
    const struct ggml_tensor * src0 = dst->src[0];
    if (w->first) {
        return (struct fq4_group) { (const char *) src0->data + i * src0->nb[2], w->first[i + 1] - w->first[i],
                                    w->columns + w->first[i], i };
    }
    const int64_t i2 = i % dst->ne[2] / (dst->ne[2] / src0->ne[2]);
    const int64_t i3 = i / dst->ne[2] / (dst->ne[3] / src0->ne[3]);
    return (struct fq4_group) { (const char *) src0->data + i2 * src0->nb[2] + i3 * src0->nb[3], dst->ne[1], NULL, i };
}

// Column c of a group: its rounded activations and where its results go.
static const char * fq4_get_column(const struct fq4_work * w, const struct fq4_group * g, int64_t c, float ** out) {
    const struct ggml_tensor * dst  = w->dst;
    const struct ggml_tensor * src1 = dst->src[1];
    int64_t                    column;
    if (g->columns) {
        const int64_t slot  = g->columns[c] % dst->ne[1];
        const int64_t token = g->columns[c] / dst->ne[1];
        column              = token * src1->ne[1] + slot % src1->ne[1];
        *out                = (float *) ((char *) dst->data + slot * dst->nb[1] + token * dst->nb[2]);
    } else {
        const int64_t i2 = g->index % dst->ne[2];
        const int64_t i3 = g->index / dst->ne[2];
        column           = g->index * src1->ne[1] + c;
        *out             = (float *) ((char *) dst->data + c * dst->nb[1] + i2 * dst->nb[2] + i3 * dst->nb[3]);
    }
    return w->acts + column * w->act_size;
}

static void fq4_multiply_few(const struct fq4_work * w, const struct fq4_group * g, int64_t row, int64_t n_rows) {
    const struct ggml_tensor * src0 = w->dst->src[0];
    const void *               y[FEW_COLS];
    float *                    out[FEW_COLS];
    for (int64_t c = 0; c < g->n_cols; c++) {
        y[c] = fq4_get_column(w, g, c, &out[c]);
        out[c] += row;
    }
    w->path->dots((int) n_rows, (int) (src0->ne[0] / w->kind->block), g->weights + row * src0->nb[1], src0->nb[1],
                  (int) g->n_cols, y, out);
}

static void fq4_multiply_tile(const struct fq4_work * w, const struct fq4_group * g, int64_t row, int64_t n_rows,
                              int64_t col, int64_t n_cols, struct fq4_scratch * s) {
    const struct ggml_tensor * src0     = w->dst->src[0];
    const int64_t              n_blocks = src0->ne[0] / w->kind->block;
    const void *               y[CHUNK_COLS];
    float *                    out[CHUNK_COLS];
    for (int64_t c = 0; c < n_cols; c++) {
        y[c] = fq4_get_column(w, g, col + c, &out[c]);
    }
    memset(s->acc, 0, n_cols * ROWS * sizeof(float));
    for (int64_t ib = 0; ib < n_blocks; ib++) {
        w->path->decode((int) n_rows, g->weights + row * src0->nb[1] + ib * w->kind->block_size, src0->nb[1], &s->tile);
        for (int64_t c = 0; c < n_cols; c += GGML_EXT_FQ4_MAX_COLS) {
            w->path->multiply(&s->tile, (int) MIN(GGML_EXT_FQ4_MAX_COLS, n_cols - c), y + c, s->acc + c * ROWS);
        }
        for (int64_t c = 0; c < n_cols; c++) {
            y[c] = (const char *) y[c] + w->kind->act_size;
        }
    }
    for (int64_t c = 0; c < n_cols; c++) {
        memcpy(out[c] + row, s->acc + c * ROWS, n_rows * sizeof(float));
    }
}

// A group cut into pieces: by rows first, then by columns.
struct fq4_cut {
    bool    few;
    int64_t rows;     // of a piece
    int64_t by_rows;  // pieces
    int64_t n_pieces;
};

static struct fq4_cut fq4_cut_group(const struct fq4_work * w, const struct fq4_group * g) {
    struct fq4_cut cut;
    cut.few      = g->n_cols <= FEW_COLS;
    cut.rows     = cut.few ? FEW_ROWS : ROWS;
    cut.by_rows  = (w->dst->src[0]->ne[1] + cut.rows - 1) / cut.rows;
    cut.n_pieces = cut.by_rows * (cut.few ? g->n_cols > 0 : (g->n_cols + CHUNK_COLS - 1) / CHUNK_COLS);
    return cut;
}

static void fq4_compute_piece(const struct fq4_work * w, const struct fq4_group * g, const struct fq4_cut * cut,
                              int64_t piece) {
    const int64_t row   = piece % cut->by_rows * cut->rows;
    const int64_t count = MIN(cut->rows, w->dst->src[0]->ne[1] - row);
    if (cut->few) {
        fq4_multiply_few(w, g, row, count);
    } else {
        const int64_t col = piece / cut->by_rows * CHUNK_COLS;
        fq4_multiply_tile(w, g, row, count, col, MIN(CHUNK_COLS, g->n_cols - col), w->scratch);
    }
}

static void fq4_share_pieces(const struct fq4_work * w, struct fq4_range * ranges, int nth) {
    int64_t total = 0;
    for (int64_t i = 0; i < fq4_n_groups(w); i++) {
        const struct fq4_group g = fq4_get_group(w, i);
        total += fq4_cut_group(w, &g).n_pieces;
    }
    for (int t = 0; t < nth; t++) {
        atomic_init(&ranges[t].next, total * t / nth);
        ranges[t].end = total * (t + 1) / nth;
    }
}

// Computes what is left of a range. Ranges are entered in order, so the group is looked for from the last one on.
static void fq4_compute_range(const struct fq4_work * w, struct fq4_range * range) {
    struct fq4_group g      = fq4_get_group(w, 0);
    struct fq4_cut   cut    = fq4_cut_group(w, &g);
    int64_t          i      = 0;
    int64_t          before = 0;  // pieces of the groups before group i
    int64_t          piece;
    while ((piece = atomic_fetch_add_explicit(&range->next, 1, memory_order_relaxed)) < range->end) {
        while (piece >= before + cut.n_pieces) {
            before += cut.n_pieces;
            g   = fq4_get_group(w, ++i);
            cut = fq4_cut_group(w, &g);
        }
        fq4_compute_piece(w, &g, &cut, piece - before);
    }
}

static void fq4_compute(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct fq4_layout          l    = fq4_make_layout(dst, params->nth);
    char *                           base = (char *) GGML_PAD((uintptr_t) params->wdata, ALIGN);
    const bool                       id   = dst->op == GGML_OP_MUL_MAT_ID;
    const struct ggml_ext_fq4_kind * kind = fq4_kind(dst);
    const struct ggml_ext_fq4_path * path =
        params->use_ref ? kind->paths[kind->n_paths - 1] : ggml_ext_fq4_fastest(kind);
    struct fq4_range *    ranges = (struct fq4_range *) (base + l.ranges);
    const struct fq4_work w      = {
             .kind     = kind,
             .path     = path,
             .dst      = dst,
             .acts     = base + l.acts,
             .act_size = fq4_act_size(dst),
             .first    = id ? (const int32_t *) (base + l.first) : NULL,
             .columns  = id ? (const int32_t *) (base + l.columns) : NULL,
             .scratch  = (struct fq4_scratch *) (base + l.scratch) + params->ith,
    };
    if (params->ith == 0) {
        if (id) {
            fq4_group_by_expert(dst, (int32_t *) (base + l.first), (int32_t *) (base + l.columns));
        }
        fq4_share_pieces(&w, ranges, params->nth);
    }
    fq4_round_columns(&w, params);
    ggml_barrier(params->threadpool);
    for (int t = 0; t < params->nth; t++) {
        fq4_compute_range(&w, &ranges[(params->ith + t) % params->nth]);
    }
}

const struct ggml_ext_cpu_override ggml_ext_cpu_fq4_mul_mat = { fq4_applies, fq4_work_size, fq4_compute };
