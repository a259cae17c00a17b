// Attention tiles: what all instruction sets share of the decoding of K and V, and the table of paths.

#include "attention.h"
#include "core/x86.h"
#include "ggml-cpu.h"
#include "ggml-quants.h"
#define GGML_COMMON_IMPL_C
#include "ggml-common.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

#define TILE  GGML_EXT_ATTENTION_TILE
#define GROUP GGML_EXT_ATTENTION_GROUP

// --- decoding ---

static void attention_rows_of(int n, const char * rows, size_t stride, const char * out[TILE]) {
    for (int t = 0; t < TILE; t++) {
        out[t] = rows + (size_t) (t < n ? t : n - 1) * stride;  // rows beyond the end: any, their scale is 0
    }
}

static void attention_stage_q5_0(int n_blocks, const char * const rows[TILE], int8_t * out) {
    for (int t = 0; t < TILE; t++) {
        for (int g = 0; g < n_blocks; g++, out += GROUP) {
            const block_q5_0 * b = (const block_q5_0 *) rows[t] + g;
            uint32_t           high;
            memcpy(&high, b->qh, sizeof(high));
            for (int i = 0; i < 16; i++) {
                out[i]      = (int8_t) (((b->qs[i] & 15) | (high >> i & 1) << 4) - 16);
                out[i + 16] = (int8_t) ((b->qs[i] >> 4 | (high >> (i + 16) & 1) << 4) - 16);
            }
        }
    }
}

// Integers, since a comparison of floats would not vectorise.
bool ggml_ext_attention_all_finite(int n, const float * x) {
    uint32_t largest = 0;
    for (int i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof(bits));
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    return largest < 0x7f800000;
}

// One scale per token; the mean of the tile's finite tokens is taken off first where mean is not NULL.
static void attention_stage_f16(const struct ggml_ext_attention_path * path, int d, int d_pad, int n,
                                const char * const rows[TILE], float * mean, float * x, int8_t * out, float * scale) {
    for (int t = 0; t < n; t++) {
        ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) rows[t], x + (size_t) t * d_pad, d);
    }
    if (mean) {
        for (int i = 0; i < d_pad; i++) {
            mean[i] = 0.0f;
        }
        int n_finite = 0;
        for (int t = 0; t < n; t++) {
            if (!ggml_ext_attention_all_finite(d, x + (size_t) t * d_pad)) {
                continue;
            }
            for (int i = 0; i < d; i++) {
                mean[i] += x[(size_t) t * d_pad + i];
            }
            n_finite++;
        }
        for (int i = 0; n_finite && i < d; i++) {
            mean[i] /= (float) n_finite;
        }
        for (int t = 0; t < n; t++) {
            for (int i = 0; i < d; i++) {
                x[(size_t) t * d_pad + i] -= mean[i];
            }
        }
    }
    memset(out, 0, (size_t) TILE * d_pad);
    for (int t = 0; t < TILE; t++) {
        scale[t] = t < n ? path->quantize(d, d_pad, x + (size_t) t * d_pad, out + (size_t) t * d_pad) : 0.0f;
    }
}

// Fills the scales and says where pack_k and pack_v find the codes: in the rows, or staged as bare codes.
static enum ggml_type attention_stage(const struct ggml_ext_attention_path * path, enum ggml_type type, int d, int n,
                                      float * mean, struct ggml_ext_attention_tile * tile, float * scale,
                                      const char * rows[TILE]) {
    const int n_blocks = (d + GROUP - 1) / GROUP;
    const int d_pad    = n_blocks * GROUP;
    if (type == GGML_TYPE_F16) {
        attention_stage_f16(path, d, d_pad, n, rows, mean, tile->floats, tile->staging, scale);
    } else {
        path->scales(n_blocks, ggml_type_size(type), rows, scale);
        for (int g = 0; n < TILE && g < n_blocks; g++) {
            memset(scale + g * TILE + n, 0, sizeof(float) * (TILE - n));
        }
        if (type != GGML_TYPE_Q5_0) {
            return type;
        }
        attention_stage_q5_0(n_blocks, rows, tile->staging);
    }
    for (int t = 0; t < TILE; t++) {
        rows[t] = (const char *) tile->staging + (size_t) t * d_pad;
    }
    return GGML_TYPE_I8;
}

// Sets scales that are NaN or Inf to 0, so that rows that do not see the token stay as they are; returns the tokens.
static uint64_t attention_zero_nonfinite(int n_groups, float * scale) {
    if (ggml_ext_attention_all_finite(n_groups * TILE, scale)) {
        return 0;
    }
    uint64_t tokens = 0;
    for (int i = 0; i < n_groups * TILE; i++) {
        if (!isfinite(scale[i])) {
            scale[i] = 0.0f;
            tokens |= UINT64_C(1) << i % TILE;
        }
    }
    return tokens;
}

void ggml_ext_attention_load_k(const struct ggml_ext_attention_path * path, enum ggml_type type, int d, int n,
                               const char * rows, size_t stride, struct ggml_ext_attention_tile * tile) {
    const char * row[TILE];
    attention_rows_of(n, rows, stride, row);
    const enum ggml_type codes    = attention_stage(path, type, d, n, tile->k_mean, tile, tile->k_scale, row);
    const int            n_blocks = (d + GROUP - 1) / GROUP;
    tile->poisoned                = attention_zero_nonfinite(type == GGML_TYPE_F16 ? 1 : n_blocks, tile->k_scale);
    path->pack_k(codes, row, n_blocks, tile->k);
}

void ggml_ext_attention_load_v(const struct ggml_ext_attention_path * path, enum ggml_type type, int d, int n,
                               const char * rows, size_t stride, float levels, struct ggml_ext_attention_tile * tile) {
    const char * row[TILE];
    attention_rows_of(n, rows, stride, row);
    const enum ggml_type codes    = attention_stage(path, type, d, n, NULL, tile, tile->v_level, row);
    const int            n_blocks = (d + GROUP - 1) / GROUP;
    const int            n_groups = type == GGML_TYPE_F16 ? 1 : n_blocks;
    tile->poisoned |= attention_zero_nonfinite(n_groups, tile->v_level);

    // A weight times a scale has to stay positive: the sign of a scale moves to the codes.
    int8_t *   negate   = tile->staging + (codes == GGML_TYPE_I8 ? (size_t) TILE * n_blocks * GROUP : 0);
    const bool negative = path->levels(n_groups, levels, tile->v_level, tile->v_unit, negate);
    path->pack_v(codes, row, n_blocks, negative ? negate : NULL, tile->v);
}

struct ggml_ext_attention_source ggml_ext_attention_source_of(enum ggml_type type) {
    struct ggml_ext_attention_source s = { 0 };
    switch (type) {
        case GGML_TYPE_Q8_0:
            s.stride = sizeof(block_q8_0);
            s.offset = offsetof(block_q8_0, qs);
            break;
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_IQ4_NL:
            s.stride  = sizeof(block_q4_0);
            s.offset  = offsetof(block_q4_0, qs);
            s.nibbles = true;
            for (int i = 0; i < 16; i++) {
                s.table[i] = (int8_t) (type == GGML_TYPE_Q4_0 ? i - 8 : kvalues_iq4nl[i]);
            }
            break;
        case GGML_TYPE_I8:
            s.stride = GROUP;
            break;
        default:
            GGML_ABORT("attention: no codes for type %s", ggml_type_name(type));
    }
    return s;
}

// --- paths ---

const struct ggml_ext_attention_path * const ggml_ext_attention_paths[] = {
#ifdef GGML_EXT_X86
    &ggml_ext_attention_avx512,
    &ggml_ext_attention_avx2,
#endif
    &ggml_ext_attention_generic,
};
const int ggml_ext_attention_n_paths = (int) (sizeof(ggml_ext_attention_paths) / sizeof(ggml_ext_attention_paths[0]));

static atomic_int skipped = 0;

void ggml_ext_attention_skip(int n_paths) {
    GGML_ASSERT(n_paths >= 0 && n_paths < ggml_ext_attention_n_paths);
    atomic_store(&skipped, n_paths);
}

const struct ggml_ext_attention_path * ggml_ext_attention_fastest(void) {
    const struct ggml_ext_attention_path * const * path =
        ggml_ext_attention_paths + atomic_load_explicit(&skipped, memory_order_relaxed);
    while (!(*path)->available()) {
        path++;
    }
    return *path;
}
