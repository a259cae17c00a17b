// GGML_EXT_OP_ACT_ROUND: what constructor and backends share.

#ifndef GGML_EXT_ACT_ROUND_H
#define GGML_EXT_ACT_ROUND_H

#include <stdint.h>

// op_params from [1] on; src: x.
struct ggml_ext_act_round_params {
    int32_t bits;
    int32_t group;  // 0: the whole row
};

#endif  // GGML_EXT_ACT_ROUND_H
