// Which columns a tile of an FQ4 product has, and where their results go.

#pragma once

#include "common/device.cuh"
#include "tiles_problem.h"

namespace ggml_ext {

struct fq4_tile {
    const char * weights;  // of its first row
    int          n_rows, n_columns;
};

// Tile number i, column tiles before row tiles. Threads n < COLUMNS set activation[n] and result[n], the offset of the
// column's first row in dst; columns past the last one repeat it. Needs a barrier after where n_columns > 0.
template <int COLUMNS>
__device__ __forceinline__ fq4_tile fq4_find_tile(const ggml_ext_fq4_product & p, int i, int tile_rows,
                                                  int32_t * activation, int64_t * result) {
    const int row_tile = i / p.column_tiles, column_tile = i % p.column_tiles;
    const int n = threadIdx.x;
    fq4_tile  tile;
    const int row = row_tile * tile_rows;
    tile.n_rows   = min(tile_rows, p.m - row);
    int64_t matrix;
    if (p.tiles) {
        const ggml_ext_fq4_expert_tile own = p.tiles[column_tile];
        tile.n_columns                     = own.count;
        matrix                             = own.expert * p.nb2;
        if (n < COLUMNS && own.count > 0) {
            const int pair  = p.pairs[own.first + min(n, own.count - 1)];
            const int token = pair / p.n_used, slot = pair % p.n_used;
            activation[n] = token * p.ne1 + slot % p.ne1;
            result[n]     = slot * p.s1 + token * p.s2 + row;
        }
    } else {
        const int per_batch = (p.n + COLUMNS - 1) / COLUMNS;
        const int batch = column_tile / per_batch, first = column_tile % per_batch * COLUMNS;
        const int i2 = batch % p.ne2, i3 = batch / p.ne2;
        tile.n_columns = min(COLUMNS, p.n - first);
        matrix         = i2 / p.repeat2 * p.nb2 + i3 / p.repeat3 * p.nb3;
        if (n < COLUMNS) {
            const int column = first + min(n, tile.n_columns - 1);
            activation[n]    = batch * p.n + column;
            result[n]        = column * p.s1 + i2 * p.s2 + i3 * p.s3 + row;
        }
    }
    tile.weights = p.weights + matrix + row * p.nb1;
    return tile;
}

}  // namespace ggml_ext
