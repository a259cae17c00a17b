// Codes in two planes for fq4/cpu/avx512_body.h. Bit 3 of a code is left as it comes: it does not matter, and to
// clear it in place of the masks behind was no faster.

// Where `mask` has ones a, else b.
#define PLANES_SELECT(mask, a, b) _mm512_ternarylogic_epi64(_mm512_set1_epi8(mask), a, b, 0xca)

#if FQ4_QK == 64
// The codes of a block, one to a byte, in the low bits. The two low bits of weight 16 k + j are bits 2 k and 2 k + 1 of
// byte j, the high bit of weight 8 n + j is bit n of byte j: a rotation of 64 bits brings it to bit 2.
FQ4_VNNI FQ4_INLINE __m512i codes_of(const fq4_block * x) {
    long long high;
    memcpy(&high, x->high, sizeof(high));
    const __m512i low_shift = _mm512_setr_epi64(0, 0, 2, 2, 4, 4, 6, 6);
    const __m512i rotation  = _mm512_setr_epi64(2, 1, 0, 63, 62, 61, 60, 59);
    const __m512i low       = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) x->low));
    return PLANES_SELECT(3, _mm512_srlv_epi64(low, low_shift), _mm512_rolv_epi64(_mm512_set1_epi64(high), rotation));
}
#else
// The codes of a block as nibbles: in q[h] those of the weights 64 h .. 64 h + 63 low, those 128 further high. The two low
// bits of weight 64 k + j are bits 2 k and 2 k + 1 of byte j, the high bit of weight 32 n + j is bit n of byte j.
FQ4_VNNI FQ4_INLINE void nibbles_of(const fq4_block * x, __m512i q[2]) {
    const __m512i left  = _mm512_setr_epi64(2, 2, 2, 2, 1, 1, 1, 1);
    const __m512i right = _mm512_setr_epi64(0, 0, 0, 0, 1, 1, 1, 1);
    const __m512i high  = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *) x->high));
    __m512i       low   = _mm512_loadu_si512(x->low);
    __asm__("" : "+v"(low));  // or the compiler loads it twice
    q[0] = PLANES_SELECT(0x33, low, _mm512_sllv_epi64(high, left));
    q[1] = PLANES_SELECT(0x33, _mm512_srli_epi16(low, 2), _mm512_srlv_epi64(high, right));
}
#endif
