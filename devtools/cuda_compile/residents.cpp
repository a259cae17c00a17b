// The thread blocks per multiprocessor that the plans of cuda/ count on by registers, a line per kernel:
// "pattern of its name,threads of a block,blocks". residents.py compiles it with the emulator's headers.

#include "attention/decode/shape.h"
#include "attention/prefill/shapes.cuh"
#include "fq4/tiles_problem.h"
#include "fq4/vec.cuh"
#include "kron/plan.h"

#include <cstdio>

using namespace ggml_ext;

static void attention() {
    for (int dim : { 64, 96, 128, 256 }) {
        for (int groups = 1; groups <= decode_groups(16, dim); groups++) {
            std::printf("*attention_decode_kernel<*, %d, %d>,%d,%d\n", dim, groups, 32 * decode_warps,
                        decode_blocks_per_sm(dim, groups));
        }
        for (int full = 0; full <= (dim <= 128); full++) {
            attention_with_head(dim, 1, full, [&](auto s) {
                using S = decltype(s);
                std::printf("*attention_prefill_kernel<*attention_shape<%d, *, %s>*>,%d,%d\n", dim,
                            full ? "true" : "false", S::THREADS, S::BLOCKS);
            });
        }
    }
}

int main() {
    attention();
    for (int columns = 1; columns <= GGML_EXT_FQ4_VEC_MAX_COLS; columns++) {
        std::printf("ggml_ext_fq4_vec_kernel<*, %d, *>,%d,%d\n", columns, fq4_vec_threads,
                    ggml_ext_fq4_vec_per_sm(columns));
    }
    for (int columns = 16; columns <= 128; columns *= 2) {
        std::printf("ggml_ext_fq4_tiles_kernel<*, %d>,%d,%d\n", columns, GGML_EXT_FQ4_TILE_THREADS,
                    ggml_ext_fq4_tile_residents(columns));
    }
    for (int warps : { 4, GGML_EXT_KRON_MAX_WARPS }) {
        std::printf("ggml_ext_kron_kernel<*>,%d,%d\n", 32 * warps,
                    blocks_by_registers(GGML_EXT_KRON_REGISTERS, 32 * warps));
    }
}
