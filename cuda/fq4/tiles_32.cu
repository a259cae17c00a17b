#include "tiles.cuh"
#include "tiles_instances.h"

GGML_EXT_FQ4_TILES_INSTANCE(ggml_ext::fq4_layout, 32)
GGML_EXT_FQ4_TILES_INSTANCE(ggml_ext::fq4_64_layout, 32)
