#include "pairs.h"

#include "fq4/table.h"

#define FQ4_UNSIGNED(t)     (t) + 128
#define FQ4_PAIR(low, high) { GGML_EXT_FQ4_ROW_##low(FQ4_UNSIGNED), GGML_EXT_FQ4_ROW_##high(FQ4_UNSIGNED) }
// clang-format off
#define FQ4_PAIRS(high)                                                                         \
    FQ4_PAIR(0, high),  FQ4_PAIR(1, high),  FQ4_PAIR(2, high),  FQ4_PAIR(3, high),              \
    FQ4_PAIR(4, high),  FQ4_PAIR(5, high),  FQ4_PAIR(6, high),  FQ4_PAIR(7, high),              \
    FQ4_PAIR(8, high),  FQ4_PAIR(9, high),  FQ4_PAIR(10, high), FQ4_PAIR(11, high),             \
    FQ4_PAIR(12, high), FQ4_PAIR(13, high), FQ4_PAIR(14, high), FQ4_PAIR(15, high)
// clang-format on

const uint8_t ggml_ext_fq4_pairs[256][32] __attribute__((aligned(64))) = {
    FQ4_PAIRS(0),  FQ4_PAIRS(1),  FQ4_PAIRS(2),  FQ4_PAIRS(3),  FQ4_PAIRS(4),  FQ4_PAIRS(5),
    FQ4_PAIRS(6),  FQ4_PAIRS(7),  FQ4_PAIRS(8),  FQ4_PAIRS(9),  FQ4_PAIRS(10), FQ4_PAIRS(11),
    FQ4_PAIRS(12), FQ4_PAIRS(13), FQ4_PAIRS(14), FQ4_PAIRS(15),
};
