// FQ4 products for AVX-512 with VNNI, chosen at run time: function attributes give each path its instructions,
// whatever flags the file is compiled with.
//
// vpdpbusd multiplies unsigned with signed bytes: weights are decoded to T + 128, and a sum starts from the
// activations' `start`, which takes the surplus off.
//
// Tile: two groups of 16 rows. The 64 bytes at w[4096 g + 16 k], k = 0, 4, .. 252, hold the weights k .. k + 3 of row
// 16 g + l in lane l: one register times four activations, broadcast, adds to 16 rows.

#include "fq4-paths-cpu.h"

#if defined(__x86_64__) && defined(__GNUC__)
#    include <float.h>
#    include <immintrin.h>
#    include <math.h>
#    include <string.h>

#    define FQ4_VNNI   __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#    define FQ4_VBMI   __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")))
#    define FQ4_INLINE static inline __attribute__((always_inline))

typedef struct ggml_ext_fq4_act fq4_act;

static bool has_vnni(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}

static bool has_vbmi(void) {
    return has_vnni() && __builtin_cpu_supports("avx512vbmi");
}

FQ4_VNNI static void quantize(int64_t k, const float * x, fq4_act * y) {
    const __m512i ones = _mm512_set1_epi8(1);
    for (; k > 0; k -= QK_FQ4, x += QK_FQ4, y++) {
        // As integers, magnitudes keep their order and NaN is the largest.
        __m512i max = _mm512_setzero_si512();
        for (int i = 0; i < QK_FQ4; i += 16) {
            const __m512i bits = _mm512_castps_si512(_mm512_loadu_ps(x + i));
            max                = _mm512_max_epi32(max, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
        }
        const int32_t max_bits = _mm512_reduce_max_epi32(max);
        float         largest;
        memcpy(&largest, &max_bits, sizeof(largest));
        const float inv = 127.0f / largest;
        if (max_bits >= 0x7f800000 || !(inv <= FLT_MAX)) {
            y->d     = max_bits >= 0x7f800000 ? NAN : 0.0f;
            y->start = 0;
            memset(y->q, 0, sizeof(y->q));
            continue;
        }
        const __m512 scale = _mm512_set1_ps(inv);
        __m512i      sum   = _mm512_setzero_si512();
        for (int i = 0; i < QK_FQ4; i += 64) {
            for (int j = i; j < i + 64; j += 16) {
                const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + j), scale));
                _mm_storeu_si128((__m128i *) (y->q + j), _mm512_cvtepi32_epi8(q));
            }
            sum = _mm512_dpbusd_epi32(sum, ones, _mm512_loadu_si512(y->q + i));
        }
        y->d     = 1.0f / inv;
        y->start = -128 * _mm512_reduce_add_epi32(sum);
    }
}

// Lane l of the 16 registers becomes register l: t[i] lane l = what was t[l] lane i.
FQ4_VNNI FQ4_INLINE void transpose(__m512i t[16]) {
    __m512i u[16];
    for (int i = 0; i < 16; i += 4) {
        const __m512i ab_lo = _mm512_unpacklo_epi32(t[i], t[i + 1]);
        const __m512i ab_hi = _mm512_unpackhi_epi32(t[i], t[i + 1]);
        const __m512i cd_lo = _mm512_unpacklo_epi32(t[i + 2], t[i + 3]);
        const __m512i cd_hi = _mm512_unpackhi_epi32(t[i + 2], t[i + 3]);
        u[i]                = _mm512_unpacklo_epi64(ab_lo, cd_lo);
        u[i + 1]            = _mm512_unpackhi_epi64(ab_lo, cd_lo);
        u[i + 2]            = _mm512_unpacklo_epi64(ab_hi, cd_hi);
        u[i + 3]            = _mm512_unpackhi_epi64(ab_hi, cd_hi);
    }
    // u[4 m + j], 128-bit lane n: rows 4 m .. 4 m + 3 of column 4 n + j.
    for (int j = 0; j < 4; j++) {
        const __m512i lo_02 = _mm512_shuffle_i32x4(u[j], u[4 + j], 0x88);
        const __m512i lo_13 = _mm512_shuffle_i32x4(u[j], u[4 + j], 0xdd);
        const __m512i hi_02 = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0x88);
        const __m512i hi_13 = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0xdd);
        t[j]                = _mm512_shuffle_i32x4(lo_02, hi_02, 0x88);
        t[8 + j]            = _mm512_shuffle_i32x4(lo_02, hi_02, 0xdd);
        t[4 + j]            = _mm512_shuffle_i32x4(lo_13, hi_13, 0x88);
        t[12 + j]           = _mm512_shuffle_i32x4(lo_13, hi_13, 0xdd);
    }
}

FQ4_VNNI FQ4_INLINE void multiply_cols(const struct ggml_ext_fq4_tile * tile, const int n_cols,
                                       const fq4_act * const * y, float * acc) {
    __m512i     sum[GGML_EXT_FQ4_MAX_COLS][2];
#    pragma GCC unroll 8
    for (int c = 0; c < n_cols; c++) {
        sum[c][0] = sum[c][1] = _mm512_set1_epi32(y[c]->start);
    }
    for (int k = 0; k < QK_FQ4; k += 4) {
        const __m512i w0 = _mm512_load_si512(tile->w + 16 * k);
        const __m512i w1 = _mm512_load_si512(tile->w + 16 * QK_FQ4 + 16 * k);
#    pragma GCC unroll 8
        for (int c = 0; c < n_cols; c++) {
            int32_t four;
            memcpy(&four, y[c]->q + k, sizeof(four));
            const __m512i q = _mm512_set1_epi32(four);
            sum[c][0]       = _mm512_dpbusd_epi32(sum[c][0], w0, q);
            sum[c][1]       = _mm512_dpbusd_epi32(sum[c][1], w1, q);
        }
    }
    const __m512 d0 = _mm512_load_ps(tile->d);
    const __m512 d1 = _mm512_load_ps(tile->d + 16);
#    pragma GCC  unroll 8
    for (int c = 0; c < n_cols; c++) {
        const __m512 d   = _mm512_set1_ps(y[c]->d);
        float *      out = acc + c * GGML_EXT_FQ4_TILE_ROWS;
        _mm512_store_ps(out, _mm512_fmadd_ps(_mm512_mul_ps(d0, d), _mm512_cvtepi32_ps(sum[c][0]), _mm512_load_ps(out)));
        _mm512_store_ps(out + 16,
                        _mm512_fmadd_ps(_mm512_mul_ps(d1, d), _mm512_cvtepi32_ps(sum[c][1]), _mm512_load_ps(out + 16)));
    }
}

FQ4_VNNI static void multiply(const struct ggml_ext_fq4_tile * tile, int n_cols, const fq4_act * const * y,
                              float * acc) {
    switch (n_cols) {
        case 1:
            multiply_cols(tile, 1, y, acc);
            return;
        case 2:
            multiply_cols(tile, 2, y, acc);
            return;
        case 3:
            multiply_cols(tile, 3, y, acc);
            return;
        case 4:
            multiply_cols(tile, 4, y, acc);
            return;
        case 5:
            multiply_cols(tile, 5, y, acc);
            return;
        case 6:
            multiply_cols(tile, 6, y, acc);
            return;
        case 7:
            multiply_cols(tile, 7, y, acc);
            return;
        default:
            multiply_cols(tile, 8, y, acc);
            return;
    }
}

// The table of a path, in registers.
struct fq4_table {
    __m512i rows[4];    // 4 rows of T + 128 each
    __m512i spread[4];  // spread[g], 128-bit lane l: 4 g + l in every byte
};

FQ4_VNNI FQ4_INLINE struct fq4_table load_table(void) {
    const __m512i lanes =
        _mm512_set_epi32(0x03030303, 0x03030303, 0x03030303, 0x03030303, 0x02020202, 0x02020202, 0x02020202, 0x02020202,
                         0x01010101, 0x01010101, 0x01010101, 0x01010101, 0, 0, 0, 0);
    struct fq4_table table;
    for (int i = 0; i < 4; i++) {
        table.rows[i]   = _mm512_xor_si512(_mm512_loadu_si512(ggml_ext_fq4_table[4 * i]), _mm512_set1_epi8(-128));
        table.spread[i] = _mm512_add_epi8(lanes, _mm512_set1_epi8((char) (4 * i)));
    }
    return table;
}

// The codes of a block, 64 weights per register, in order.
FQ4_VNNI FQ4_INLINE void unpack_codes(const ggml_ext_block_fq4 * x, __m512i codes[4]) {
    const __m512i mask = _mm512_set1_epi8(15);
    for (int h = 0; h < 2; h++) {
        const __m512i q  = _mm512_loadu_si512(x->q + 64 * h);
        codes[2 * h]     = _mm512_and_si512(q, mask);
        codes[2 * h + 1] = _mm512_and_si512(_mm512_srli_epi16(q, 4), mask);
    }
}

FQ4_VNNI FQ4_INLINE const __m128i * table_row(const ggml_ext_block_fq4 * x, int sub_block) {
    return (const __m128i *) ggml_ext_fq4_table[x->s[sub_block / 2] >> (4 * (sub_block % 2)) & 15];
}

// The 256 weights of a block as T + 128, 64 per register. Without VBMI: 16 weights share a table row, which one lane
// of vpshufb holds.
FQ4_VNNI FQ4_INLINE void decode_block_vnni(const struct fq4_table * table, const ggml_ext_block_fq4 * x, __m512i w[4]) {
    (void) table;
    __m512i codes[4];
    unpack_codes(x, codes);
    for (int i = 0; i < 4; i++) {
        __m512i rows = _mm512_castsi128_si512(_mm_loadu_si128(table_row(x, 4 * i)));
        rows         = _mm512_inserti32x4(rows, _mm_loadu_si128(table_row(x, 4 * i + 1)), 1);
        rows         = _mm512_inserti32x4(rows, _mm_loadu_si128(table_row(x, 4 * i + 2)), 2);
        rows         = _mm512_inserti32x4(rows, _mm_loadu_si128(table_row(x, 4 * i + 3)), 3);
        w[i]         = _mm512_xor_si512(_mm512_shuffle_epi8(rows, codes[i]), _mm512_set1_epi8(-128));
    }
}

// With VBMI the whole table is in four registers: the index row * 16 + code is one byte, its top bit picks one of two
// 128-byte permutes. No memory look-up, no work per sub-block.
FQ4_VBMI FQ4_INLINE void decode_block_vbmi(const struct fq4_table * table, const ggml_ext_block_fq4 * x, __m512i w[4]) {
    const __m128i s8     = _mm_loadl_epi64((const __m128i *) x->s);
    const __m128i high   = _mm_set1_epi8(-16);
    const __m128i even   = _mm_and_si128(_mm_slli_epi16(s8, 4), high);
    const __m128i odd    = _mm_and_si128(s8, high);
    // 16 times the sub-blocks' row indices, one per byte, in every lane.
    const __m512i rows16 = _mm512_broadcast_i32x4(_mm_unpacklo_epi8(even, odd));
    __m512i       codes[4];
    unpack_codes(x, codes);
    for (int i = 0; i < 4; i++) {
        const __m512i index = _mm512_or_si512(_mm512_shuffle_epi8(rows16, table->spread[i]), codes[i]);
        const __m512i lower = _mm512_permutex2var_epi8(table->rows[0], index, table->rows[1]);
        const __m512i upper = _mm512_permutex2var_epi8(table->rows[2], index, table->rows[3]);
        w[i]                = _mm512_mask_mov_epi8(lower, _mm512_movepi8_mask(index), upper);
    }
}

#    define FQ4_TARGET     FQ4_VNNI
#    define FQ4_NAME(name) name##_vnni
#    include "fq4-avx512-decode.h"
#    undef FQ4_TARGET
#    undef FQ4_NAME
#    define FQ4_TARGET     FQ4_VBMI
#    define FQ4_NAME(name) name##_vbmi
#    include "fq4-avx512-decode.h"

const struct ggml_ext_fq4_path ggml_ext_fq4_avx512_vbmi = { "avx512-vbmi", has_vbmi,    quantize,
                                                            dots_vbmi,     decode_vbmi, multiply };
const struct ggml_ext_fq4_path ggml_ext_fq4_avx512_vnni = { "avx512-vnni", has_vnni,    quantize,
                                                            dots_vnni,     decode_vnni, multiply };

#endif
