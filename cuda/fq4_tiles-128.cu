#include "fq4_tiles-instances.h"
#include "fq4_tiles.cuh"

GGML_EXT_FQ4_TILES_INSTANCE(128)
