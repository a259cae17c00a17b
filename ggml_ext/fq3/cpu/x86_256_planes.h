// Codes in two planes for fq4/cpu/x86_256_body.h: nibbles as FQ4's, the weights 32 v .. 32 v + 31 low in q[v], those FQ4_RUN
// further high. Their bits 3 and 7 are 0, and a row of the table lies there twice: vpshufb ignores all else but bits 0 to 2.

FQ4_INLINE __m256i fq4_join(__m256i low, __m256i high) {
    return _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi8(0x33)),
                           _mm256_and_si256(high, _mm256_set1_epi8(0x44)));
}

FQ4_INLINE __m256i fq4_index(__m256i q) {
    return q;
}

#if FQ4_QK == 64
// The two low bits of weight 16 k + j are bits 2 k and 2 k + 1 of byte j, the high bit of weight 8 n + j is bit n of byte j.
FQ4_INLINE void fq4_nibbles(const fq4_block * x, __m256i q[1]) {
    long long bits;
    memcpy(&bits, x->high, sizeof(bits));
    const __m256i left = _mm256_sllv_epi64(_mm256_set1_epi64x(bits), _mm256_setr_epi64x(2, 1, 0, 0));
    const __m256i high = _mm256_srlv_epi64(left, _mm256_setr_epi64x(0, 0, 0, 1));
    const __m256i low  = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) x->low));
    q[0]               = fq4_join(_mm256_srlv_epi64(low, _mm256_setr_epi64x(0, 0, 2, 2)), high);
}
#else
// The two low bits of weight 64 k + j are bits 2 k and 2 k + 1 of byte j, the high bit of weight 32 n + j is bit n of byte j.
FQ4_INLINE void fq4_nibbles(const fq4_block * x, __m256i q[4]) {
    __m256i high = _mm256_loadu_si256((const __m256i *) x->high);
    __m256i low0 = _mm256_loadu_si256((const __m256i *) x->low);
    __m256i low1 = _mm256_loadu_si256((const __m256i *) (x->low + 32));
    __asm__("" : "+x"(high), "+x"(low0), "+x"(low1));  // or GCC loads them twice
    q[0] = fq4_join(low0, _mm256_slli_epi16(high, 2));
    q[1] = fq4_join(low1, _mm256_add_epi8(high, high));
    q[2] = fq4_join(_mm256_srli_epi16(low0, 2), high);
    q[3] = fq4_join(_mm256_srli_epi16(low1, 2), _mm256_srli_epi16(high, 1));
}
#endif
