// FQ4 dot products with Q8_K activations for x86 SIMD, chosen at run time: function attributes give
// each path its instructions, whatever flags the file is compiled with.
//
// All paths accumulate in int32 over a block of 256, so they equal the reference exactly in their
// integer part: |T| <= 127 and |y| <= 127, hence a block's sum stays below 2^22.

#include "fq4-cpu.h"

#define GGML_COMMON_DECL_C
#include "ggml-common.h"
#include "ggml-impl.h"

#include <assert.h>

#if defined(__x86_64__) && defined(__GNUC__)
#    define FQ4_X86 1
#    include <immintrin.h>
#endif

static bool fq4_always(void) {
    return true;
}

#ifdef FQ4_X86

#    define FQ4_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#    define FQ4_TARGET_VNNI __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#    define FQ4_TARGET_VBMI \
        __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")))

static bool fq4_has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static bool fq4_has_vnni(void) {
    return fq4_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}

static bool fq4_has_vbmi(void) {
    return fq4_has_vnni() && __builtin_cpu_supports("avx512vbmi");
}

static inline const int8_t * fq4_row(const ggml_ext_block_fq4 * x, int sub_block) {
    return ggml_ext_fq4_table[x->s[sub_block / 2] >> (4 * (sub_block % 2)) & 15];
}

// Two sub-blocks per 256-bit vector, their table rows one per 128-bit lane. vpmaddubsw wants an
// unsigned operand: |T| with the sign moved to y; its pair sums stay below 2 * 127 * 127 < 2^15.
FQ4_TARGET_AVX2 static inline __m256i fq4_mul_32_avx2(const int8_t * row0, const int8_t * row1, __m256i codes,
                                                      const int8_t * y) {
    const __m256i table = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *) row0)),
                                                  _mm_loadu_si128((const __m128i *) row1), 1);
    const __m256i t     = _mm256_shuffle_epi8(table, codes);
    const __m256i y8    = _mm256_loadu_si256((const __m256i *) y);
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(t), _mm256_sign_epi8(y8, t));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

FQ4_TARGET_AVX2 static float fq4_dot_avx2(int n_blocks, const void * vx, const void * vy) {
    const ggml_ext_block_fq4 * x    = vx;
    const block_q8_K *         y    = vy;
    const __m256i              mask = _mm256_set1_epi8(15);
    __m256                     acc  = _mm256_setzero_ps();
    for (int ib = 0; ib < n_blocks; ib++) {
        __m256i sum = _mm256_setzero_si256();
        for (int h = 0; h < 4; h++) {  // 32 bytes of codes: 32 weights low, 32 weights 64 further high
            const int      b  = 8 * (h / 2) + 2 * (h % 2);
            const int8_t * q8 = y[ib].qs + 16 * b;
            const __m256i  q  = _mm256_loadu_si256((const __m256i *) (x[ib].q + 32 * h));
            const __m256i  lo = _mm256_and_si256(q, mask);
            const __m256i  hi = _mm256_and_si256(_mm256_srli_epi16(q, 4), mask);
            sum = _mm256_add_epi32(sum, fq4_mul_32_avx2(fq4_row(x + ib, b), fq4_row(x + ib, b + 1), lo, q8));
            sum = _mm256_add_epi32(sum, fq4_mul_32_avx2(fq4_row(x + ib, b + 4), fq4_row(x + ib, b + 5), hi, q8 + 64));
        }
        const __m256 d = _mm256_set1_ps(_cvtsh_ss(x[ib].d) * y[ib].d);
        acc            = _mm256_fmadd_ps(d, _mm256_cvtepi32_ps(sum), acc);
    }
    __m128 r = _mm_add_ps(_mm256_castps256_ps128(acc), _mm256_extractf128_ps(acc, 1));
    r        = _mm_add_ps(r, _mm_movehl_ps(r, r));
    r        = _mm_add_ss(r, _mm_movehdup_ps(r));
    return _mm_cvtss_f32(r);
}

// vpdpbusd wants an unsigned operand: T + 128; the surplus of 128 sum(y) is taken off through the
// activations' sums per 16, which Q8_K carries.
FQ4_TARGET_VNNI static inline __m512i fq4_surplus(const block_q8_K * y) {
    const __m256i bsums = _mm256_loadu_si256((const __m256i *) y->bsums);
    return _mm512_zextsi256_si512(_mm256_madd_epi16(bsums, _mm256_set1_epi16(-128)));
}

// Four sub-blocks per 512-bit vector, their table rows gathered one per 128-bit lane.
FQ4_TARGET_VNNI static inline __m512i fq4_lookup_vnni(const ggml_ext_block_fq4 * x, int b, __m512i codes) {
    __m512i table = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *) fq4_row(x, b)));
    table         = _mm512_inserti32x4(table, _mm_loadu_si128((const __m128i *) fq4_row(x, b + 1)), 1);
    table         = _mm512_inserti32x4(table, _mm_loadu_si128((const __m128i *) fq4_row(x, b + 2)), 2);
    table         = _mm512_inserti32x4(table, _mm_loadu_si128((const __m128i *) fq4_row(x, b + 3)), 3);
    return _mm512_xor_si512(_mm512_shuffle_epi8(table, codes), _mm512_set1_epi8((char) 0x80));
}

FQ4_TARGET_VNNI static float fq4_dot_vnni(int n_blocks, const void * vx, const void * vy) {
    const ggml_ext_block_fq4 * x    = vx;
    const block_q8_K *         y    = vy;
    const __m512i              mask = _mm512_set1_epi8(15);
    __m512                     acc  = _mm512_setzero_ps();
    for (int ib = 0; ib < n_blocks; ib++) {
        __m512i sum = fq4_surplus(y + ib);
        for (int h = 0; h < 2; h++) {
            const int8_t * q8 = y[ib].qs + 128 * h;
            const __m512i  q  = _mm512_loadu_si512(x[ib].q + 64 * h);
            const __m512i  lo = _mm512_and_si512(q, mask);
            const __m512i  hi = _mm512_and_si512(_mm512_srli_epi16(q, 4), mask);
            sum               = _mm512_dpbusd_epi32(sum, fq4_lookup_vnni(x + ib, 8 * h, lo), _mm512_loadu_si512(q8));
            sum = _mm512_dpbusd_epi32(sum, fq4_lookup_vnni(x + ib, 8 * h + 4, hi), _mm512_loadu_si512(q8 + 64));
        }
        const __m512 d = _mm512_set1_ps(_cvtsh_ss(x[ib].d) * y[ib].d);
        acc            = _mm512_fmadd_ps(d, _mm512_cvtepi32_ps(sum), acc);
    }
    return _mm512_reduce_add_ps(acc);
}

// The whole table in four registers: the index row * 16 + code is one byte, its top bit picks one of
// two 128-byte permutes. No memory look-up, no per-sub-block work.
FQ4_TARGET_VBMI static inline __m512i fq4_lookup_vbmi(const __m512i table[4], __m512i rows16, __m512i spread,
                                                      __m512i codes) {
    const __m512i index = _mm512_or_si512(_mm512_shuffle_epi8(rows16, spread), codes);
    const __m512i low   = _mm512_permutex2var_epi8(table[0], index, table[1]);
    const __m512i high  = _mm512_permutex2var_epi8(table[2], index, table[3]);
    return _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(index), high);
}

FQ4_TARGET_VBMI static float fq4_dot_vbmi(int n_blocks, const void * vx, const void * vy) {
    const ggml_ext_block_fq4 * x      = vx;
    const block_q8_K *         y      = vy;
    const __m512i              mask   = _mm512_set1_epi8(15);
    const __m512i              offset = _mm512_set1_epi8((char) 0x80);
    __m512i                    table[4];
    for (int i = 0; i < 4; i++) {
        table[i] = _mm512_xor_si512(_mm512_loadu_si512(ggml_ext_fq4_table[4 * i]), offset);
    }
    // spread[g]: lane l takes byte 4 g + l, the row index of sub-block 4 g + l.
    const __m512i lanes =
        _mm512_set_epi32(0x03030303, 0x03030303, 0x03030303, 0x03030303, 0x02020202, 0x02020202, 0x02020202, 0x02020202,
                         0x01010101, 0x01010101, 0x01010101, 0x01010101, 0, 0, 0, 0);
    __m512i spread[4];
    for (int g = 0; g < 4; g++) {
        spread[g] = _mm512_add_epi8(lanes, _mm512_set1_epi8((char) (4 * g)));
    }
    __m512 acc = _mm512_setzero_ps();
    for (int ib = 0; ib < n_blocks; ib++) {
        // 16 row indices, times 16, one per byte, in every lane.
        const __m128i s8     = _mm_loadl_epi64((const __m128i *) x[ib].s);
        const __m128i even   = _mm_and_si128(_mm_slli_epi16(s8, 4), _mm_set1_epi8((char) 0xf0));
        const __m128i odd    = _mm_and_si128(s8, _mm_set1_epi8((char) 0xf0));
        const __m512i rows16 = _mm512_broadcast_i32x4(_mm_unpacklo_epi8(even, odd));

        __m512i sum = fq4_surplus(y + ib);
        for (int h = 0; h < 2; h++) {
            const int8_t * q8 = y[ib].qs + 128 * h;
            const __m512i  q  = _mm512_loadu_si512(x[ib].q + 64 * h);
            const __m512i  lo = _mm512_and_si512(q, mask);
            const __m512i  hi = _mm512_and_si512(_mm512_srli_epi16(q, 4), mask);
            sum = _mm512_dpbusd_epi32(sum, fq4_lookup_vbmi(table, rows16, spread[2 * h], lo), _mm512_loadu_si512(q8));
            sum = _mm512_dpbusd_epi32(sum, fq4_lookup_vbmi(table, rows16, spread[2 * h + 1], hi),
                                      _mm512_loadu_si512(q8 + 64));
        }
        const __m512 d = _mm512_set1_ps(_cvtsh_ss(x[ib].d) * y[ib].d);
        acc            = _mm512_fmadd_ps(d, _mm512_cvtepi32_ps(sum), acc);
    }
    return _mm512_reduce_add_ps(acc);
}

#endif  // FQ4_X86

const struct ggml_ext_fq4_path ggml_ext_fq4_paths[] = {
#ifdef FQ4_X86
    { "avx512-vbmi", fq4_has_vbmi, fq4_dot_vbmi         },
    { "avx512-vnni", fq4_has_vnni, fq4_dot_vnni         },
    { "avx2",        fq4_has_avx2, fq4_dot_avx2         },
#endif
    { "generic",     fq4_always,   ggml_ext_fq4_dot_ref },
};
const int ggml_ext_fq4_n_paths = (int) (sizeof(ggml_ext_fq4_paths) / sizeof(ggml_ext_fq4_paths[0]));

static ggml_ext_fq4_dot_fn fq4_fastest(void) {
    const struct ggml_ext_fq4_path * path = ggml_ext_fq4_paths;
    while (!path->available()) {
        path++;
    }
    return path->dot;
}

void ggml_ext_fq4_dot(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc) {
    assert(n % QK_FQ4 == 0 && nrc == 1);
    GGML_UNUSED(bs);
    GGML_UNUSED(bx);
    GGML_UNUSED(by);
    GGML_UNUSED(nrc);
    // Threads that race here store the same pointer.
    static _Atomic(ggml_ext_fq4_dot_fn) chosen = NULL;
    ggml_ext_fq4_dot_fn                 dot    = chosen;
    if (dot == NULL) {
        dot    = fq4_fastest();
        chosen = dot;
    }
    *s = dot(n / QK_FQ4, vx, vy);
}
