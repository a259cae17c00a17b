// What x86_256_body.h asks its including file for, with AVX2. Products of |w| with y, to which w's sign moved: vpmaddubsw
// wants an unsigned operand.

#define FQ4_TARGET GGML_EXT_AVX2
#define FQ4_OFFSET 0

// Pairs stay below 2 * 127 * 127 < 2^15, so nothing saturates.
FQ4_TARGET static inline __attribute__((always_inline)) __m256i fq4_mac(__m256i sum, __m256i w, __m256i y) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(y, w));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
