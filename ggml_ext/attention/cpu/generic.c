// The generic path of attention, in plain C: the reference of the others.

#include "core/cpu/generic.h"

#include "attention.h"
#include "ggml-cpu.h"

#include <float.h>
#include <math.h>
#include <string.h>

#define TILE  GGML_EXT_ATTENTION_TILE
#define GROUP GGML_EXT_ATTENTION_GROUP

static float attention_quantize_generic(int n, int n_pad, const float * x, int8_t * codes) {
    float max = 0.0f;
    for (int i = 0; i < n; i++) {
        max = fmaxf(max, fabsf(x[i]));
    }
    const float inverse = 127.0f / max;
    const bool  finite  = ggml_ext_attention_all_finite(n, x);
    if (!finite || !(inverse <= FLT_MAX)) {
        memset(codes, 0, n_pad);
        return finite ? 0.0f : NAN;
    }
    for (int i = 0; i < n_pad; i++) {
        codes[i] = i < n ? (int8_t) rintf(x[i] * inverse) : 0;
    }
    return max / 127.0f;
}

static void attention_scales_generic(int n_blocks, size_t block_size, const char * const * rows, float * out) {
    for (int g = 0; g < n_blocks; g++) {
        for (int t = 0; t < TILE; t++) {
            ggml_fp16_t half;
            memcpy(&half, rows[t] + g * block_size, sizeof(half));
            out[g * TILE + t] = ggml_fp16_to_fp32(half);
        }
    }
}

static bool attention_levels_generic(int n_groups, float n_levels, float * scale, float * unit, int8_t * negate) {
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

static void attention_decode_block(const struct ggml_ext_attention_source * s, const char * row, int g,
                                   int8_t out[GROUP]) {
    const char * block = row + (size_t) g * s->stride + s->offset;
    if (!s->nibbles) {
        memcpy(out, block, GROUP);
        return;
    }
    for (int i = 0; i < GROUP / 2; i++) {
        out[i]             = s->table[block[i] & 15];
        out[i + GROUP / 2] = s->table[block[i] >> 4 & 15];
    }
}

static void attention_pack_k_generic(enum ggml_type type, const char * const * rows, int n_blocks, uint8_t * k) {
    const struct ggml_ext_attention_source s = ggml_ext_attention_source_of(type);
    int8_t                                 code[GROUP];
    for (int t = 0; t < TILE; t++) {
        for (int g = 0; g < n_blocks; g++) {
            attention_decode_block(&s, rows[t], g, code);
            for (int i = 0; i < GROUP; i++) {
                k[((g * GROUP + i) / 4 * TILE + t) * 4 + i % 4] = (uint8_t) (code[i] + 128);
            }
        }
    }
}

// Where a token of a tile stands among the quads.
static int attention_quad_position(int t) {
    return (t / 16 + 4 * (t / 4 % 4)) * 4 + t % 4;
}

static void attention_pack_v_generic(enum ggml_type type, const char * const * rows, int n_blocks,
                                     const int8_t * negate, int8_t * v) {
    const struct ggml_ext_attention_source s = ggml_ext_attention_source_of(type);
    int8_t                                 code[GROUP];
    for (int t = 0; t < TILE; t++) {
        const int at = attention_quad_position(t);
        for (int g = 0; g < n_blocks; g++) {
            attention_decode_block(&s, rows[t], g, code);
            for (int i = 0; i < GROUP; i++) {
                v[(at / 4 * n_blocks * GROUP + g * GROUP + i) * 4 + at % 4] =
                    (int8_t) (negate && negate[g * TILE + t] ? -code[i] : code[i]);
            }
        }
    }
}

static void attention_scores_generic(const struct ggml_ext_attention_dims * dims,
                                     const struct ggml_ext_attention_tile * tile,
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

static float attention_exp2_generic(float x) {
    x             = x > GGML_EXT_EXP2_MIN ? x : GGML_EXT_EXP2_MIN;  // the bound for NaN
    const float n = rintf(x);
    const float r = x - n;
    float       y = fmaf(GGML_EXT_EXP2_C5, r, GGML_EXT_EXP2_C4);
    y             = fmaf(y, r, GGML_EXT_EXP2_C3);
    y             = fmaf(y, r, GGML_EXT_EXP2_C2);
    y             = fmaf(y, r, GGML_EXT_EXP2_C1);
    return ldexpf(fmaf(y, r, 1.0f), (int) n);
}

static void attention_softcap_generic(int n, float cap, float * s) {
    for (int i = 0; i < n; i++) {
        s[i] = cap * tanhf(s[i]);
    }
}

static void attention_weights_generic(const struct ggml_ext_attention_dims * dims,
                                      const struct ggml_ext_attention_tile * tile, int n,
                                      const struct ggml_ext_attention_rows * rows) {
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
        const float alpha   = attention_exp2_generic(rows->max[r] - new_max);
        const float gamma   = attention_exp2_generic(max - new_max);
        rows->max[r]        = new_max;
        rows->alpha[r]      = alpha;
        rows->gamma[r]      = gamma;

        float *     sum   = rows->sum + r * 16;
        const float shift = max == -INFINITY ? 0.0f : max;
        for (int t = 0; t < TILE; t++) {
            s[t] = attention_exp2_generic(s[t] - shift);
        }
        for (int i = 0; i < 16; i++) {
            sum[i] = fmaf(gamma, (s[i] + s[i + 16]) + (s[i + 32] + s[i + 48]), sum[i] * alpha);
        }
        for (int g = 0; g < dims->v_groups; g++) {
            uint8_t * p = rows->p + (size_t) (r * dims->v_groups + g) * dims->planes * TILE;
            for (int t = 0; t < TILE; t++) {
                const int weight = (int) rintf(s[t] * tile->v_level[g * TILE + t]);
                const int at     = attention_quad_position(t);
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

static void attention_accumulate_generic(const struct ggml_ext_attention_dims * dims,
                                         const struct ggml_ext_attention_tile * tile,
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
    .available  = ggml_ext_always,
    .quantize   = attention_quantize_generic,
    .scales     = attention_scales_generic,
    .levels     = attention_levels_generic,
    .pack_k     = attention_pack_k_generic,
    .pack_v     = attention_pack_v_generic,
    .scores     = attention_scores_generic,
    .softcap    = attention_softcap_generic,
    .weights    = attention_weights_generic,
    .accumulate = attention_accumulate_generic,
};
