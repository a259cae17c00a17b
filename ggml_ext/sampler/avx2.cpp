#include "core/x86.h"
#include "exp.h"
#include "kernels.h"

namespace ggml_ext_sampling {

#ifdef GGML_EXT_X86

namespace {

GGML_EXT_AVX2 inline __m256d exp4(__m256d x) {
    const __m256d live    = _mm256_cmp_pd(x, _mm256_set1_pd(exp_least), _CMP_GE_OQ);
    const __m256d shift   = _mm256_set1_pd(exp_shift);
    const __m256d shifted = _mm256_fmadd_pd(x, _mm256_set1_pd(exp_per_ln2), shift);
    const __m256d n       = _mm256_sub_pd(shifted, shift);
    __m256d       r       = _mm256_fnmadd_pd(n, _mm256_set1_pd(exp_ln2_hi), x);
    r                     = _mm256_fnmadd_pd(n, _mm256_set1_pd(exp_ln2_lo), r);

    __m256d p = _mm256_fmadd_pd(_mm256_set1_pd(exp_c6), r, _mm256_set1_pd(exp_c5));
    p         = _mm256_fmadd_pd(p, r, _mm256_set1_pd(exp_c4));
    p         = _mm256_fmadd_pd(p, r, _mm256_set1_pd(exp_c3));
    p         = _mm256_fmadd_pd(p, r, _mm256_set1_pd(exp_c2));
    p         = _mm256_fmadd_pd(p, r, _mm256_set1_pd(1.0));
    p         = _mm256_mul_pd(p, r);

    const __m256i bits     = _mm256_castpd_si256(shifted);
    const __m256i low      = _mm256_set1_epi64x(15);
    const __m256d power    = _mm256_i64gather_pd(exp_table, _mm256_and_si256(bits, low), 8);
    const __m256i exponent = _mm256_slli_epi64(_mm256_andnot_si256(low, bits), 48);
    const __m256d s        = _mm256_castsi256_pd(_mm256_add_epi64(_mm256_castpd_si256(power), exponent));
    return _mm256_and_pd(live, _mm256_fmadd_pd(s, p, s));
}

GGML_EXT_AVX2 inline __m256d x4(const float * l, const scale & s) {
    const __m256d value = _mm256_cvtps_pd(_mm_loadu_ps(l));
    return _mm256_mul_pd(_mm256_sub_pd(value, _mm256_set1_pd(s.max)), _mm256_set1_pd(s.inv_t));
}

GGML_EXT_AVX2 inline float reduce_min(__m256 v) {
    __m128 r = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    r        = _mm_min_ps(r, _mm_movehl_ps(r, r));
    return _mm_cvtss_f32(_mm_min_ss(r, _mm_movehdup_ps(r)));
}

GGML_EXT_AVX2 inline float reduce_max(__m256 v) {
    __m128 r = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    r        = _mm_max_ps(r, _mm_movehl_ps(r, r));
    return _mm_cvtss_f32(_mm_max_ss(r, _mm_movehdup_ps(r)));
}

GGML_EXT_AVX2 bool range(const float * l, int n, float * min, float * max) {
    if (n < 8) {
        return kernels_generic().range(l, n, min, max);
    }
    __m256 least = _mm256_loadu_ps(l);
    __m256 most  = least;
    __m256 nan   = _mm256_setzero_ps();
    for (int i = 0; i < n; i += 8) {
        // The last vector overlaps the one before it.
        const __m256 value = _mm256_loadu_ps(l + (i + 8 <= n ? i : n - 8));
        least              = _mm256_min_ps(least, value);
        most               = _mm256_max_ps(most, value);
        nan                = _mm256_or_ps(nan, _mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    }
    *min = reduce_min(least);
    *max = reduce_max(most);
    return _mm256_movemask_ps(nan) == 0;
}

GGML_EXT_AVX2 double weights(const float * l, int n, const scale & s, double * w) {
    __m256d low  = _mm256_setzero_pd();
    __m256d high = _mm256_setzero_pd();
    int     i    = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256d w0 = exp4(x4(l + i, s));
        const __m256d w1 = exp4(x4(l + i + 4, s));
        _mm256_storeu_pd(w + i, w0);
        _mm256_storeu_pd(w + i + 4, w1);
        low  = _mm256_add_pd(low, w0);
        high = _mm256_add_pd(high, w1);
    }
    double lane[8];
    _mm256_storeu_pd(lane, low);
    _mm256_storeu_pd(lane + 4, high);
    for (int j = 0; i < n; i++, j++) {
        w[i] = exp_scalar((double(l[i]) - s.max) * s.inv_t);
        lane[j] += w[i];
    }
    return add_lanes(lane);
}

GGML_EXT_AVX2 void buckets(const float * l, int n, const scale & s, const bucketing & b, uint16_t * out) {
    const __m256d last      = _mm256_set1_pd(b.n_buckets - 1);
    const __m256d magnitude = _mm256_castsi256_pd(_mm256_set1_epi64x(INT64_MAX));
    int           i         = 0;
    for (; i + 4 <= n; i += 4) {
        const __m256d away = _mm256_and_pd(_mm256_sub_pd(x4(l + i, s), _mm256_set1_pd(b.center)), magnitude);
        const __m256d key  = _mm256_min_pd(_mm256_mul_pd(away, _mm256_set1_pd(b.per_key)), last);
        const __m128i wide = _mm256_cvttpd_epi32(key);
        _mm_storel_epi64((__m128i *) (out + i), _mm_packus_epi32(wide, wide));
    }
    kernels_generic().buckets(l + i, n - i, s, b, out + i);
}

GGML_EXT_AVX2 int compact(const float * l, const int32_t * id, int32_t first, int n, float least, float * out_l,
                          int32_t * out_id) {
    const __m256 limit = _mm256_set1_ps(least);
    int          count = 0;
    int          i     = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256 value = _mm256_loadu_ps(l + i);
        unsigned     keep  = unsigned(_mm256_movemask_ps(_mm256_cmp_ps(value, limit, _CMP_GE_OQ)));
        for (; keep; keep &= keep - 1) {
            const int j    = i + __builtin_ctz(keep);
            out_id[count]  = id ? id[j] : first + j;
            out_l[count++] = l[j];
        }
    }
    return count + kernels_generic().compact(l + i, id ? id + i : nullptr, first + i, n - i, least, out_l + count,
                                             out_id + count);
}

// As take_words in avx512.cpp, for eight candidates.
template <int second, int third> GGML_EXT_AVX2 inline __m256i take_words(const __m256i * v, __m256i order) {
    return _mm256_permutevar8x32_epi32(_mm256_blend_epi32(_mm256_blend_epi32(v[0], v[1], second), v[2], third), order);
}

GGML_EXT_AVX2 bool unpack(const int32_t * data, int32_t first, int n, float * l) {
    const __m256i step   = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i ids    = _mm256_setr_epi32(0, 3, 6, 1, 4, 7, 2, 5);
    const __m256i logits = _mm256_setr_epi32(1, 4, 7, 2, 5, 0, 3, 6);
    __m256i       same   = _mm256_set1_epi32(-1);
    int           i      = 0;
    for (; i + 8 <= n; i += 8) {
        const int32_t * from = data + 3 * i;
        const __m256i   v[3] = { _mm256_loadu_si256((const __m256i *) from),
                                 _mm256_loadu_si256((const __m256i *) (from + 8)),
                                 _mm256_loadu_si256((const __m256i *) (from + 16)) };
        const __m256i   id   = take_words<0x92, 0x24>(v, ids);
        _mm256_storeu_si256((__m256i *) (l + i), take_words<0x24, 0x49>(v, logits));
        same = _mm256_and_si256(same, _mm256_cmpeq_epi32(id, _mm256_add_epi32(_mm256_set1_epi32(first + i), step)));
    }
    return kernels_generic().unpack(data + 3 * i, first + i, n - i, l + i) && _mm256_movemask_epi8(same) == -1;
}

}  // namespace

const kernels * kernels_avx2() {
    static constexpr kernels table = { "avx2", range, weights, buckets, compact, unpack };
    return ggml_ext_has_avx2() ? &table : nullptr;
}

#else

const kernels * kernels_avx2() {
    return nullptr;
}

#endif

}  // namespace ggml_ext_sampling
