// FQ4_64 reference: encoder, decoder. As in fq4.c every float operation is a single-precision one in the order written;
// the numpy version is python/ggml_ext/gguf/fq4_64.py.

#include "fq4_64.h"

#include "fq4/encode.h"
#include "ggml-impl.h"
#include "scale.h"

#include <assert.h>
#include <math.h>
#include <string.h>

static_assert(sizeof(ggml_ext_block_fq4_64) == 35, "FQ4_64 blocks are packed");

#define N_SUBS (QK_FQ4_64 / QK_FQ4_SUB)

// First guesses of d: so many consecutive scales from that of factor * absmax / 127 on, then refits. docs/fq4_64.md and
// docs/fq3.md, "candidates".
#define FIRST_FACTOR 0.95f
#define N_GUESSES    8
#define N_REFITS     2

// The scales are consecutive floats of 3 bits of fraction: a byte is a float's bits from 20 on, less this.
#define FIRST_SCALE ((127 - 24) << 3)

// clang-format off
#define SIX(p)    1.125f * (p), 1.25f * (p), 1.375f * (p), 1.5f * (p), 1.625f * (p), 1.75f * (p)
#define OCTAVE(p) (p), SIX(p), 1.875f * (p)
const float ggml_ext_fq4_64_scales[256] = {
    0.0f, SIX(0x1p-24f), 1.875f * 0x1p-24f,
    OCTAVE(0x1p-23f), OCTAVE(0x1p-22f), OCTAVE(0x1p-21f), OCTAVE(0x1p-20f), OCTAVE(0x1p-19f), OCTAVE(0x1p-18f),
    OCTAVE(0x1p-17f), OCTAVE(0x1p-16f), OCTAVE(0x1p-15f), OCTAVE(0x1p-14f), OCTAVE(0x1p-13f), OCTAVE(0x1p-12f),
    OCTAVE(0x1p-11f), OCTAVE(0x1p-10f), OCTAVE(0x1p-9f),  OCTAVE(0x1p-8f),  OCTAVE(0x1p-7f),  OCTAVE(0x1p-6f),
    OCTAVE(0x1p-5f),  OCTAVE(0x1p-4f),  OCTAVE(0x1p-3f),  OCTAVE(0x1p-2f),  OCTAVE(0x1p-1f),  OCTAVE(0x1p0f),
    OCTAVE(0x1p1f),   OCTAVE(0x1p2f),   OCTAVE(0x1p3f),   OCTAVE(0x1p4f),   OCTAVE(0x1p5f),   OCTAVE(0x1p6f),
    0x1p7f, SIX(0x1p7f), NAN,
};
// clang-format on

uint8_t ggml_ext_fq4_64_round_d(float d) {
    if (!(d > 0.5f * ggml_ext_fq4_64_scales[1])) {
        return 0;
    }
    if (!(d < ggml_ext_fq4_64_scales[GGML_EXT_FQ4_64_LARGEST])) {
        return GGML_EXT_FQ4_64_LARGEST;
    }
    uint32_t bits;
    memcpy(&bits, &d, sizeof(bits));
    const uint32_t rounded = (bits + 0x7ffff + (bits >> 20 & 1)) >> 20;
    return (uint8_t) (rounded > FIRST_SCALE ? rounded - FIRST_SCALE : 1);
}

bool ggml_ext_fq4_64_search(const float * x, const float * weight, struct ggml_ext_fq4_choice * best) {
    float largest;
    if (!ggml_ext_fq4_largest(QK_FQ4_64, x, GGML_EXT_FQ4_64_MAX_WEIGHT, &largest)) {
        return false;
    }
    const int first = ggml_ext_fq4_64_round_d(largest * (FIRST_FACTOR / 127.0f));
    const int end   = MIN(first + N_GUESSES, GGML_EXT_FQ4_64_LARGEST + 1);
    // Where the first is 0, the weights are too small for any scale: zeros.
    for (int d = first; first > 0 && d < end; d++) {
        ggml_ext_fq4_try(N_SUBS, x, weight, ggml_ext_fq4_64_scales[d], best);
    }
    for (int k = 0; k < N_REFITS && best->d > 0.0f; k++) {
        const uint8_t d = ggml_ext_fq4_64_round_d(ggml_ext_fq4_refit(N_SUBS, x, weight, best));
        ggml_ext_fq4_try(N_SUBS, x, weight, ggml_ext_fq4_64_scales[d], best);
    }
    return first == 0 || best->d > 0.0f;  // else the cost of every scale overflowed: zeros would be wrong
}

bool ggml_ext_fq4_64_check(const char * name, const void * data, size_t n_blocks, size_t block_size) {
    const uint8_t * d = data;
    for (size_t i = 0; i < n_blocks; i++, d += block_size) {
        if (*d == GGML_EXT_FQ4_64_NAN) {
            GGML_LOG_ERROR("%s: found nan value at block %zu\n", name, i);
            return false;
        }
    }
    return true;
}

static void pack(const struct ggml_ext_fq4_choice * choice, void * to) {
    ggml_ext_block_fq4_64 * block = to;
    block->d                      = ggml_ext_fq4_64_round_d(choice->d);
    ggml_ext_fq4_pack_rows(choice, N_SUBS, block->s);
    for (int j = 0; j < 32; j++) {
        block->q[j] = (uint8_t) (ggml_ext_fq4_code(choice, j) | ggml_ext_fq4_code(choice, 32 + j) << 4);
    }
}

static void refuse(void * block) {
    ((ggml_ext_block_fq4_64 *) block)->d = GGML_EXT_FQ4_64_NAN;
}

static const struct ggml_ext_fq4_encoder encoder = {
    &ggml_ext_fq4_nearest, QK_FQ4_64, sizeof(ggml_ext_block_fq4_64), ggml_ext_fq4_64_search, pack, refuse,
};

void ggml_ext_fq4_64_quantize_row(const float * x, void * y, int64_t k) {
    ggml_ext_fq4_64_quantize(x, y, 1, k, NULL);
}

size_t ggml_ext_fq4_64_quantize(const float * src, void * dst, int64_t nrows, int64_t n_per_row,
                                const float * imatrix) {
    return ggml_ext_fq4_encode_rows(&encoder, src, dst, nrows, n_per_row, imatrix);
}

void ggml_ext_fq4_64_dequantize_row(const void * x, float * y, int64_t k) {
    assert(k % QK_FQ4_64 == 0);
    const ggml_ext_block_fq4_64 * block = x;
    for (int64_t ib = 0; ib < k / QK_FQ4_64; ib++, block++, y += QK_FQ4_64) {
        const float d = ggml_ext_fq4_64_scales[block->d];
        for (int i = 0; i < QK_FQ4_64; i++) {
            const int row  = block->s[i / 32] >> (4 * (i / 16 % 2)) & 15;
            const int code = block->q[i % 32] >> (4 * (i / 32)) & 15;
            y[i]           = d * (float) ggml_ext_fq4_table[row][code];
        }
    }
}

bool ggml_ext_fq4_64_validate(const void * data, size_t n_blocks) {
    return ggml_ext_fq4_64_check(__func__, data, n_blocks, sizeof(ggml_ext_block_fq4_64));
}
