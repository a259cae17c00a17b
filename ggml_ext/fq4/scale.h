// FQ4's scale, shared by its encoders.

#ifndef GGML_EXT_FQ4_SCALE_H
#define GGML_EXT_FQ4_SCALE_H

// Weights beyond this would need a d that fp16 cannot hold: 1.3 * 6e6 / 127 < 65504.
#define GGML_EXT_FQ4_MAX_WEIGHT 6e6f

// d as a block can hold it: the nearest fp16, at most the largest finite one.
float ggml_ext_fq4_round_d(float d);

#endif  // GGML_EXT_FQ4_SCALE_H
