#include "fq4/cpu/pairs.h"

#include "fq3/table.h"
#include "rows.h"

#define SAME(t)         t
#define UNSIGNED(t)     (t) + 128
#define TWICE(s, f)     GGML_EXT_FQ3_ROW_##s(f), GGML_EXT_FQ3_ROW_##s(f)
#define PAIR(low, high) { TWICE(low, UNSIGNED), TWICE(high, UNSIGNED) }
#define ROW(s)          { TWICE(s, SAME) }

const uint8_t ggml_ext_fq3_pairs[256][32] __attribute__((aligned(64))) = { GGML_EXT_FQ4_PAIRS(PAIR) };

const int8_t ggml_ext_fq3_rows[16][16] __attribute__((aligned(16))) = {
    ROW(0), ROW(1), ROW(2),  ROW(3),  ROW(4),  ROW(5),  ROW(6),  ROW(7),
    ROW(8), ROW(9), ROW(10), ROW(11), ROW(12), ROW(13), ROW(14), ROW(15),
};
