// The parts of fq4-avx512-cpu.c that decode weights, included once per way to decode: FQ4_TARGET gives the
// instructions, FQ4_NAME(decode_block) decodes a block.

FQ4_TARGET FQ4_INLINE void FQ4_NAME(dots_cols)(int n_blocks, const ggml_ext_block_fq4 * x, const int n_cols,
                                               const fq4_act * const * y, float * out) {
    const struct fq4_table table = load_table();
    __m512                 acc[GGML_EXT_FQ4_MAX_COLS];
#pragma GCC unroll 8
    for (int c = 0; c < n_cols; c++) {
        acc[c] = _mm512_setzero_ps();
    }
    for (int ib = 0; ib < n_blocks; ib++) {
        __m512i w[4];
        FQ4_NAME(decode_block)(&table, x + ib, w);
        const float d = _cvtsh_ss(x[ib].d);
#pragma GCC unroll 8
        for (int c = 0; c < n_cols; c++) {
            const fq4_act * act = y[c] + ib;
            __m512i         sum = _mm512_zextsi128_si512(_mm_cvtsi32_si128(act->start));
            for (int i = 0; i < 4; i++) {
                sum = _mm512_dpbusd_epi32(sum, w[i], _mm512_loadu_si512(act->q + 64 * i));
            }
            acc[c] = _mm512_fmadd_ps(_mm512_set1_ps(d * act->d), _mm512_cvtepi32_ps(sum), acc[c]);
        }
    }
#pragma GCC unroll 8
    for (int c = 0; c < n_cols; c++) {
        out[c] = _mm512_reduce_add_ps(acc[c]);
    }
}

FQ4_TARGET static void FQ4_NAME(dots)(int n_blocks, const void * x, int n_cols, const fq4_act * const * y,
                                      float * out) {
    switch (n_cols) {
        case 1:
            FQ4_NAME(dots_cols)(n_blocks, x, 1, y, out);
            return;
        case 2:
            FQ4_NAME(dots_cols)(n_blocks, x, 2, y, out);
            return;
        case 3:
            FQ4_NAME(dots_cols)(n_blocks, x, 3, y, out);
            return;
        case 4:
            FQ4_NAME(dots_cols)(n_blocks, x, 4, y, out);
            return;
        case 5:
            FQ4_NAME(dots_cols)(n_blocks, x, 5, y, out);
            return;
        case 6:
            FQ4_NAME(dots_cols)(n_blocks, x, 6, y, out);
            return;
        case 7:
            FQ4_NAME(dots_cols)(n_blocks, x, 7, y, out);
            return;
        default:
            FQ4_NAME(dots_cols)(n_blocks, x, 8, y, out);
            return;
    }
}

FQ4_TARGET static void FQ4_NAME(decode)(int n_rows, const void * x, size_t row_size, struct ggml_ext_fq4_tile * tile) {
    const struct fq4_table table = load_table();
    for (int first = 0; first < GGML_EXT_FQ4_TILE_ROWS; first += 16) {
        __m512i t[4][16];
        for (int l = 0; l < 16; l++) {
            const int r = first + l;
            if (r < n_rows) {
                const ggml_ext_block_fq4 * block = (const void *) ((const char *) x + r * row_size);
                __m512i                    w[4];
                FQ4_NAME(decode_block)(&table, block, w);
                for (int i = 0; i < 4; i++) {
                    t[i][l] = w[i];
                }
                tile->d[r] = _cvtsh_ss(block->d);
            } else {
                for (int i = 0; i < 4; i++) {
                    t[i][l] = _mm512_set1_epi8(-128);
                }
                tile->d[r] = 0.0f;
            }
        }
        for (int i = 0; i < 4; i++) {
            transpose(t[i]);
            for (int j = 0; j < 16; j++) {
                _mm512_store_si512(tile->w + QK_FQ4 * first + 64 * (16 * i + j), t[i][j]);
            }
        }
    }
}
