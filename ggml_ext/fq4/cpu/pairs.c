#include "pairs.h"

#include "fq4/table.h"

#define UNSIGNED(t)     (t) + 128
#define PAIR(low, high) { GGML_EXT_FQ4_ROW_##low(UNSIGNED), GGML_EXT_FQ4_ROW_##high(UNSIGNED) }

const uint8_t ggml_ext_fq4_pairs[256][32] __attribute__((aligned(64))) = { GGML_EXT_FQ4_PAIRS(PAIR) };
