// Codes in two planes for fq4/cpu/neon_body.h: nibbles as FQ4's, the weights 16 v .. 16 v + 15 low in q[v], those FQ4_RUN
// further high. Bit 3 of a code is left as it comes: it does not matter.

FQ4_INLINE uint8x16_t join(uint8x16_t low, uint8x16_t high) {
    return vbslq_u8(vdupq_n_u8(0x33), low, high);
}

#if FQ4_QK == 64
// The two low bits of weight 16 k + j are bits 2 k and 2 k + 1 of byte j, the high bit of weight 8 n + j is bit n of byte j.
FQ4_INLINE void nibbles_of(const fq4_block * x, uint8x16_t q[2]) {
    const uint8x8_t  bits = vld1_u8(x->high);
    const uint8x16_t low  = vld1q_u8(x->low);
    q[0]                  = join(low, vcombine_u8(vshl_n_u8(bits, 2), vshl_n_u8(bits, 1)));
    q[1]                  = join(vshrq_n_u8(low, 2), vcombine_u8(bits, vshr_n_u8(bits, 1)));
}
#else
// The two low bits of weight 64 k + j are bits 2 k and 2 k + 1 of byte j, the high bit of weight 32 n + j is bit n of byte j.
FQ4_INLINE void nibbles_of(const fq4_block * x, uint8x16_t q[8]) {
    for (int i = 0; i < 2; i++) {
        const uint8x16_t high = vld1q_u8(x->high + 16 * i);
        const uint8x16_t low0 = vld1q_u8(x->low + 16 * i);
        const uint8x16_t low1 = vld1q_u8(x->low + 32 + 16 * i);
        q[i]                  = join(low0, vshlq_n_u8(high, 2));
        q[2 + i]              = join(low1, vshlq_n_u8(high, 1));
        q[4 + i]              = join(vshrq_n_u8(low0, 2), high);
        q[6 + i]              = join(vshrq_n_u8(low1, 2), vshrq_n_u8(high, 1));
    }
}
#endif
