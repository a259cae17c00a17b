// Attention tiles: what all instruction sets share of the decoding of K and V, and the generic path.

#include "attention-cpu.h"
#include "ggml-cpu.h"
#include "ggml-quants.h"
#define GGML_COMMON_IMPL_C
#include "ggml-common.h"

#include <float.h>
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#define TILE  GGML_EXT_ATTENTION_TILE
#define GROUP GGML_EXT_ATTENTION_GROUP

// --- decoding ---

static void rows_of(int n, const char * rows, size_t stride, const char * out[TILE]) {
    for (int t = 0; t < TILE; t++) {
        out[t] = rows + (size_t) (t < n ? t : n - 1) * stride;  // rows beyond the end: any, their scale is 0
    }
}

static void stage_q5_0(int n_blocks, const char * const rows[TILE], int8_t * out) {
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
static bool all_finite(int n, const float * x) {
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
static void stage_f16(const struct ggml_ext_attention_path * path, int d, int d_pad, int n,
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
            if (!all_finite(d, x + (size_t) t * d_pad)) {
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
static enum ggml_type stage(const struct ggml_ext_attention_path * path, enum ggml_type type, int d, int n,
                            float * mean, struct ggml_ext_attention_tile * tile, float * scale,
                            const char * rows[TILE]) {
    const int n_blocks = (d + GROUP - 1) / GROUP;
    const int d_pad    = n_blocks * GROUP;
    if (type == GGML_TYPE_F16) {
        stage_f16(path, d, d_pad, n, rows, mean, tile->floats, tile->staging, scale);
    } else {
        path->scales(n_blocks, ggml_type_size(type), rows, scale);
        for (int g = 0; n < TILE && g < n_blocks; g++) {
            memset(scale + g * TILE + n, 0, sizeof(float) * (TILE - n));
        }
        if (type != GGML_TYPE_Q5_0) {
            return type;
        }
        stage_q5_0(n_blocks, rows, tile->staging);
    }
    for (int t = 0; t < TILE; t++) {
        rows[t] = (const char *) tile->staging + (size_t) t * d_pad;
    }
    return GGML_TYPE_I8;
}

// Sets scales that are NaN or Inf to 0, so that rows that do not see the token stay as they are; returns the tokens.
static uint64_t take_spoilt(int n_groups, float * scale) {
    if (all_finite(n_groups * TILE, scale)) {
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
    rows_of(n, rows, stride, row);
    const enum ggml_type codes    = stage(path, type, d, n, tile->k_mean, tile, tile->k_scale, row);
    const int            n_blocks = (d + GROUP - 1) / GROUP;
    tile->spoilt                  = take_spoilt(type == GGML_TYPE_F16 ? 1 : n_blocks, tile->k_scale);
    path->pack_k(codes, row, n_blocks, tile->k);
}

void ggml_ext_attention_load_v(const struct ggml_ext_attention_path * path, enum ggml_type type, int d, int n,
                               const char * rows, size_t stride, float levels, struct ggml_ext_attention_tile * tile) {
    const char * row[TILE];
    rows_of(n, rows, stride, row);
    const enum ggml_type codes    = stage(path, type, d, n, NULL, tile, tile->v_level, row);
    const int            n_blocks = (d + GROUP - 1) / GROUP;
    const int            n_groups = type == GGML_TYPE_F16 ? 1 : n_blocks;
    tile->spoilt |= take_spoilt(n_groups, tile->v_level);

    // A weight times a scale has to stay positive: the sign of a scale moves to the codes.
    int8_t *   negate   = tile->staging + (codes == GGML_TYPE_I8 ? (size_t) TILE * n_blocks * GROUP : 0);
    const bool negative = path->levels(n_groups, levels, tile->v_level, tile->v_unit, negate);
    path->pack_v(codes, row, n_blocks, negative ? negate : NULL, tile->v);
}

// --- generic path ---

static bool always(void) {
    return true;
}

static float quantize_generic(int n, int n_pad, const float * x, int8_t * codes) {
    float max = 0.0f;
    for (int i = 0; i < n; i++) {
        max = fmaxf(max, fabsf(x[i]));
    }
    const float inverse = 127.0f / max;
    const bool  finite  = all_finite(n, x);
    if (!finite || !(inverse <= FLT_MAX)) {
        memset(codes, 0, n_pad);
        return finite ? 0.0f : NAN;
    }
    for (int i = 0; i < n_pad; i++) {
        codes[i] = i < n ? (int8_t) rintf(x[i] * inverse) : 0;
    }
    return max / 127.0f;
}

static void scales_generic(int n_blocks, size_t block_size, const char * const * rows, float * out) {
    for (int g = 0; g < n_blocks; g++) {
        for (int t = 0; t < TILE; t++) {
            ggml_fp16_t half;
            memcpy(&half, rows[t] + g * block_size, sizeof(half));
            out[g * TILE + t] = ggml_fp16_to_fp32(half);
        }
    }
}

static bool levels_generic(int n_groups, float n_levels, float * scale, float * unit, int8_t * negate) {
    bool negative = false;
    for (int g = 0; g < n_groups; g++, scale += TILE, negate += TILE) {
        float max = 0.0f;
        for (int t = 0; t < TILE; t++) {
            negate[t] = scale[t] < 0.0f ? -1 : 0;
            negative |= negate[t] != 0;
            max = fmaxf(max, fabsf(scale[t]));
        }
        unit[g]             = max / n_levels;
        const float inverse = max > 0.0f ? n_levels / max : 0.0f;
        for (int t = 0; t < TILE; t++) {
            scale[t] = fabsf(scale[t]) * inverse;
        }
    }
    return negative;
}

static void decode_block(enum ggml_type type, const char * row, int g, int8_t out[GROUP]) {
    const uint8_t * nibbles = (const uint8_t *) row + (size_t) g * sizeof(block_q4_0) + offsetof(block_q4_0, qs);
    switch (type) {
        case GGML_TYPE_Q8_0:
            memcpy(out, ((const block_q8_0 *) row)[g].qs, GROUP);
            break;
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_IQ4_NL:  // the same block with a table
            for (int i = 0; i < GROUP; i++) {
                const int nibble = i < 16 ? nibbles[i] & 15 : nibbles[i - 16] >> 4;
                out[i]           = (int8_t) (type == GGML_TYPE_Q4_0 ? nibble - 8 : kvalues_iq4nl[nibble]);
            }
            break;
        case GGML_TYPE_I8:
            memcpy(out, row + g * GROUP, GROUP);
            break;
        default:
            GGML_ABORT("attention: no codes for type %s", ggml_type_name(type));
    }
}

static void pack_k_generic(enum ggml_type type, const char * const * rows, int n_blocks, uint8_t * k) {
    int8_t code[GROUP];
    for (int t = 0; t < TILE; t++) {
        for (int g = 0; g < n_blocks; g++) {
            decode_block(type, rows[t], g, code);
            for (int i = 0; i < GROUP; i++) {
                k[((g * GROUP + i) / 4 * TILE + t) * 4 + i % 4] = (uint8_t) (code[i] + 128);
            }
        }
    }
}

// Where a token of a tile stands among the quads.
static int quad_position(int t) {
    return (t / 16 + 4 * (t / 4 % 4)) * 4 + t % 4;
}

static void pack_v_generic(enum ggml_type type, const char * const * rows, int n_blocks, const int8_t * negate,
                           int8_t * v) {
    int8_t code[GROUP];
    for (int t = 0; t < TILE; t++) {
        const int at = quad_position(t);
        for (int g = 0; g < n_blocks; g++) {
            decode_block(type, rows[t], g, code);
            for (int i = 0; i < GROUP; i++) {
                v[(at / 4 * n_blocks * GROUP + g * GROUP + i) * 4 + at % 4] =
                    (int8_t) (negate && negate[g * TILE + t] ? -code[i] : code[i]);
            }
        }
    }
}

static void scores_generic(const struct ggml_ext_attention_dims * dims, const struct ggml_ext_attention_tile * tile,
                           const struct ggml_ext_attention_rows * rows) {
    const int width = dims->dk_pad / dims->k_groups;
    for (int r = 0; r < rows->n_rows; r++) {
        for (int t = 0; t < TILE; t++) {
            float s = 0.0f;
            for (int g = 0; g < dims->k_groups; g++) {
                int32_t sum = rows->q_start[r * dims->k_groups + g];
                for (int i = g * width; i < (g + 1) * width; i++) {
                    sum += rows->q[r * dims->dk_pad + i] * tile->k[(i / 4 * TILE + t) * 4 + i % 4];
                }
                s = fmaf((float) sum, tile->k_scale[g * TILE + t], s);
            }
            rows->s[r * TILE + t] = fmaf(s, rows->q_scale[r], rows->q_bias ? rows->q_bias[r] : 0.0f);
        }
    }
}

static float exp2_generic(float x) {
    x             = x > GGML_EXT_EXP2_MIN ? x : GGML_EXT_EXP2_MIN;  // the bound for NaN
    const float n = rintf(x);
    const float r = x - n;
    float       y = fmaf(GGML_EXT_EXP2_C5, r, GGML_EXT_EXP2_C4);
    y             = fmaf(y, r, GGML_EXT_EXP2_C3);
    y             = fmaf(y, r, GGML_EXT_EXP2_C2);
    y             = fmaf(y, r, GGML_EXT_EXP2_C1);
    return ldexpf(fmaf(y, r, 1.0f), (int) n);
}

static void softcap_generic(int n, float cap, float * s) {
    for (int i = 0; i < n; i++) {
        s[i] = cap * tanhf(s[i]);
    }
}

static void weights_generic(const struct ggml_ext_attention_dims * dims, const struct ggml_ext_attention_tile * tile,
                            int n, const struct ggml_ext_attention_rows * rows) {
    for (int r = 0; r < rows->n_rows; r++) {
        float * s   = rows->s + r * TILE;
        float   max = -INFINITY;
        for (int t = 0; t < TILE; t++) {
            if (t >= n) {
                s[t] = -INFINITY;
            } else if (rows->mask[r]) {
                s[t] = fmaf(ggml_fp16_to_fp32(rows->mask[r][t]), rows->slope[r], s[t]);
            }
            max = fmaxf(max, s[t]);
        }
        const float new_max = fmaxf(rows->max[r], max);
        const float alpha   = exp2_generic(rows->max[r] - new_max);
        const float gamma   = exp2_generic(max - new_max);
        rows->max[r]        = new_max;
        rows->alpha[r]      = alpha;
        rows->gamma[r]      = gamma;

        float *     sum   = rows->sum + r * 16;
        const float shift = max == -INFINITY ? 0.0f : max;
        for (int t = 0; t < TILE; t++) {
            s[t] = exp2_generic(s[t] - shift);
        }
        for (int i = 0; i < 16; i++) {
            sum[i] = fmaf(gamma, (s[i] + s[i + 16]) + (s[i + 32] + s[i + 48]), sum[i] * alpha);
        }
        for (int g = 0; g < dims->v_groups; g++) {
            uint8_t * p = rows->p + (size_t) (r * dims->v_groups + g) * dims->planes * TILE;
            for (int t = 0; t < TILE; t++) {
                const int weight = (int) rintf(s[t] * tile->v_level[g * TILE + t]);
                const int at     = quad_position(t);
                if (dims->planes == 2) {
                    p[at]        = (uint8_t) (weight >> 8);
                    p[at + TILE] = (uint8_t) (weight & 255);
                } else {
                    p[at] = (uint8_t) weight;
                }
            }
        }
    }
}

static void accumulate_generic(const struct ggml_ext_attention_dims * dims, const struct ggml_ext_attention_tile * tile,
                               const struct ggml_ext_attention_rows * rows) {
    const int width = dims->dv_pad / dims->v_groups;
    for (int r = 0; r < rows->n_rows; r++) {
        for (int i = 0; i < dims->dv_pad; i++) {
            const int       g   = i / width;
            const uint8_t * p   = rows->p + (size_t) (r * dims->v_groups + g) * dims->planes * TILE;
            int32_t         sum = 0;
            for (int plane = 0; plane < dims->planes; plane++, p += TILE) {
                sum *= 256;
                for (int at = 0; at < TILE; at++) {
                    sum += p[at] * tile->v[(at / 4 * dims->dv_pad + i) * 4 + at % 4];
                }
            }
            float * o = rows->o + (size_t) r * dims->dv_pad + i;
            *o        = fmaf((float) sum, rows->gamma[r] * tile->v_unit[g], *o * rows->alpha[r]);
        }
    }
}

const struct ggml_ext_attention_path ggml_ext_attention_generic = {
    .name       = "generic",
    .available  = always,
    .quantize   = quantize_generic,
    .scales     = scales_generic,
    .levels     = levels_generic,
    .pack_k     = pack_k_generic,
    .pack_v     = pack_v_generic,
    .scores     = scores_generic,
    .softcap    = softcap_generic,
    .weights    = weights_generic,
    .accumulate = accumulate_generic,
};

const struct ggml_ext_attention_path * const ggml_ext_attention_paths[] = {
#if defined(__x86_64__) && defined(__GNUC__)
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
