#include "tiles.cuh"
#include "tiles_instances.h"

GGML_EXT_FQ4_TILES_INSTANCE(16)
