#if defined(__GNUC__) && !defined(__clang__)
// The header's own undefined vectors, GCC bug 105593.
#    pragma GCC diagnostic ignored "-Wuninitialized"
#    pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "core/x86.h"
#include "exp.h"
#include "kernels.h"

namespace ggml_ext_sampling {

#ifdef GGML_EXT_X86

namespace {

GGML_EXT_AVX512 inline __m512d exp8(__m512d x) {
    const __mmask8 live    = _mm512_cmp_pd_mask(x, _mm512_set1_pd(exp_least), _CMP_GE_OQ);
    const __m512d  shift   = _mm512_set1_pd(exp_shift);
    const __m512d  shifted = _mm512_fmadd_pd(x, _mm512_set1_pd(exp_per_ln2), shift);
    const __m512d  n       = _mm512_sub_pd(shifted, shift);
    __m512d        r       = _mm512_fnmadd_pd(n, _mm512_set1_pd(exp_ln2_hi), x);
    r                      = _mm512_fnmadd_pd(n, _mm512_set1_pd(exp_ln2_lo), r);

    __m512d p = _mm512_fmadd_pd(_mm512_set1_pd(exp_c6), r, _mm512_set1_pd(exp_c5));
    p         = _mm512_fmadd_pd(p, r, _mm512_set1_pd(exp_c4));
    p         = _mm512_fmadd_pd(p, r, _mm512_set1_pd(exp_c3));
    p         = _mm512_fmadd_pd(p, r, _mm512_set1_pd(exp_c2));
    p         = _mm512_fmadd_pd(p, r, _mm512_set1_pd(1.0));
    p         = _mm512_mul_pd(p, r);

    // The permutation looks at the low four bits of an index only.
    const __m512i bits     = _mm512_castpd_si512(shifted);
    const __m512d power    = _mm512_permutex2var_pd(_mm512_load_pd(exp_table), bits, _mm512_load_pd(exp_table + 8));
    const __m512i exponent = _mm512_slli_epi64(_mm512_andnot_si512(_mm512_set1_epi64(15), bits), 48);
    const __m512d s        = _mm512_castsi512_pd(_mm512_add_epi64(_mm512_castpd_si512(power), exponent));
    return _mm512_maskz_fmadd_pd(live, s, p, s);
}

GGML_EXT_AVX512 inline __m512d x8(const float * l, __mmask8 mask, const scale & s) {
    const __m512d value = _mm512_maskz_cvtps_pd(mask, _mm256_maskz_loadu_ps(mask, l));
    return _mm512_mul_pd(_mm512_sub_pd(value, _mm512_set1_pd(s.max)), _mm512_set1_pd(s.inv_t));
}

inline __mmask8 mask8(int count) {
    return count >= 8 ? 0xff : (__mmask8) ((1u << count) - 1);
}

GGML_EXT_AVX512 bool range(const float * l, int n, float * min, float * max) {
    __m512    least = _mm512_set1_ps(l[0]);
    __m512    most  = least;
    __mmask16 nan   = 0;
    for (int i = 0; i < n; i += 16) {
        const __mmask16 mask  = ggml_ext_mask16(n - i);
        const __m512    value = _mm512_mask_loadu_ps(_mm512_set1_ps(l[0]), mask, l + i);
        least                 = _mm512_min_ps(least, value);
        most                  = _mm512_max_ps(most, value);
        nan |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    }
    *min = _mm512_reduce_min_ps(least);
    *max = _mm512_reduce_max_ps(most);
    return nan == 0;
}

GGML_EXT_AVX512 double weights(const float * l, int n, const scale & s, double * w) {
    __m512d sum = _mm512_setzero_pd();
    for (int i = 0; i < n; i += 8) {
        const __mmask8 mask   = mask8(n - i);
        const __m512d  weight = _mm512_maskz_mov_pd(mask, exp8(x8(l + i, mask, s)));
        _mm512_mask_storeu_pd(w + i, mask, weight);
        sum = _mm512_add_pd(sum, weight);
    }
    double lane[8];
    _mm512_storeu_pd(lane, sum);
    return add_lanes(lane);
}

GGML_EXT_AVX512 void buckets(const float * l, int n, const scale & s, const bucketing & b, uint16_t * out) {
    const __m512d last = _mm512_set1_pd(b.n_buckets - 1);
    for (int i = 0; i < n; i += 8) {
        const __mmask8 mask = mask8(n - i);
        const __m512d  away = _mm512_abs_pd(_mm512_sub_pd(x8(l + i, mask, s), _mm512_set1_pd(b.center)));
        const __m512d  key  = _mm512_min_pd(_mm512_mul_pd(away, _mm512_set1_pd(b.per_key)), last);
        _mm_mask_storeu_epi16(out + i, mask, _mm256_cvtepi32_epi16(_mm512_cvttpd_epi32(key)));
    }
}

GGML_EXT_AVX512 int compact(const float * l, const int32_t * id, int32_t first, int n, float least, float * out_l,
                            int32_t * out_id) {
    const __m512  limit = _mm512_set1_ps(least);
    const __m512i step  = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    int           count = 0;
    for (int i = 0; i < n; i += 16) {
        const __mmask16 mask  = ggml_ext_mask16(n - i);
        const __m512    value = _mm512_maskz_loadu_ps(mask, l + i);
        const __m512i   ids =
            id ? _mm512_maskz_loadu_epi32(mask, id + i) : _mm512_add_epi32(_mm512_set1_epi32(first + i), step);
        const __mmask16 keep = _mm512_mask_cmp_ps_mask(mask, value, limit, _CMP_GE_OQ);
        if (keep) {
            // Compressing in a register and storing all of it: the compressing store is microcode on some processors.
            _mm512_storeu_ps(out_l + count, _mm512_maskz_compress_ps(keep, value));
            _mm512_storeu_si512(out_id + count, _mm512_maskz_compress_epi32(keep, ids));
            count += __builtin_popcount(keep);
        }
    }
    return count;
}

// 16 candidates are three vectors. Word 3 i + c of them has another place in its vector for each i, so the vectors of
// one c fit into one, which is then put in order: the place of 3 i + c in its vector is its remainder by 16.
GGML_EXT_AVX512 inline __m512i take_words(const __m512i * v, __mmask16 second, __mmask16 third, __m512i order) {
    const __m512i mixed = _mm512_mask_mov_epi32(_mm512_mask_mov_epi32(v[0], second, v[1]), third, v[2]);
    return _mm512_permutexvar_epi32(order, mixed);
}

GGML_EXT_AVX512 bool unpack(const int32_t * data, int32_t first, int n, float * l) {
    const __m512i step   = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i ids    = _mm512_setr_epi32(0, 3, 6, 9, 12, 15, 2, 5, 8, 11, 14, 1, 4, 7, 10, 13);
    const __m512i logits = _mm512_setr_epi32(1, 4, 7, 10, 13, 0, 3, 6, 9, 12, 15, 2, 5, 8, 11, 14);
    __mmask16     other  = 0;
    int           i      = 0;
    for (; i + 16 <= n; i += 16) {
        const int32_t * from = data + 3 * i;
        const __m512i v[3] = { _mm512_loadu_si512(from), _mm512_loadu_si512(from + 16), _mm512_loadu_si512(from + 32) };
        const __m512i id   = take_words(v, 0x4924, 0x2492, ids);
        _mm512_storeu_si512(l + i, take_words(v, 0x9249, 0x4924, logits));
        other |= _mm512_cmpneq_epi32_mask(id, _mm512_add_epi32(_mm512_set1_epi32(first + i), step));
    }
    return kernels_generic().unpack(data + 3 * i, first + i, n - i, l + i) && other == 0;
}

}  // namespace

const kernels * kernels_avx512() {
    static constexpr kernels table = { "avx512", range, weights, buckets, compact, unpack };
    return ggml_ext_has_avx512() ? &table : nullptr;
}

#else

const kernels * kernels_avx512() {
    return nullptr;
}

#endif

}  // namespace ggml_ext_sampling
