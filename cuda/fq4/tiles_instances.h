// Launchers of ggml_ext_fq4_tiles_kernel, two per width of a tile, each width in a file of its own: builds run
// in parallel.

#pragma once

#include "tiles_problem.h"

#include <cuda_runtime.h>

namespace ggml_ext {
struct fq4_layout;
struct fq4_64_layout;
}  // namespace ggml_ext

// p.n_ranges thread blocks; where ranges may start inside a tile (split), one launch more joins the parts.
template <typename L, int COLUMNS>
cudaError_t ggml_ext_fq4_tiles_launch(const ggml_ext_fq4_product & p, bool split, cudaStream_t stream);

#define GGML_EXT_FQ4_TILES_INSTANCE(L, COLUMNS)                                                                  \
    template <>                                                                                                  \
    cudaError_t ggml_ext_fq4_tiles_launch<L, COLUMNS>(const ggml_ext_fq4_product & p, bool split,                \
                                                      cudaStream_t stream) {                                     \
        const dim3        threads(GGML_EXT_FQ4_TILE_THREADS);                                                    \
        const cudaError_t error =                                                                                \
            ggml_ext_cuda_launch(ggml_ext_fq4_tiles_kernel<L, COLUMNS>, dim3(p.n_ranges), threads,               \
                                 ggml_ext_fq4_tile_shared(COLUMNS, L::weights), stream, p);                      \
        if (error != cudaSuccess || !split) {                                                                    \
            return error;                                                                                        \
        }                                                                                                        \
        return ggml_ext_cuda_launch(ggml_ext_fq4_tiles_join<COLUMNS>, dim3(p.n_ranges, COLUMNS / 8), threads, 0, \
                                    stream, p);                                                                  \
    }
