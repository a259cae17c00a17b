"""The C kernels of rounding (ggml_ext/rounding/), rows split over threads. The results do not depend on
the number of threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from ggml_ext.core.cpus import processors
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.methods.rounding.grid import Bytes, Floats, Grid
from ggml_ext.runtime import native

# Types whose scale and table rows are chosen jointly with the codes: weights and bytes per block.
_JOINT = {"fq4": (256, 138), "fq4_64": (64, 35)}
_CHUNK_ROWS = 64


def gptq_grid(grid: Grid, w: Floats, u: Floats, threads: int) -> tuple[Bytes, Floats, Floats]:
    """Rounds the columns of w [rows, n] in order onto the levels of the grid (its own are ignored).

    u float32 [n, n]: this block's part of the upper Cholesky factor of the inverse Hessian. Returns levels
    [rows, n], errors e [rows, n] and their sums of squares [rows].
    """
    w, u = np.ascontiguousarray(w, np.float32), np.ascontiguousarray(u, np.float32)
    levels, err = np.empty(w.shape, np.uint8), np.empty(w.shape, np.float32)
    cost = np.empty(len(w), np.float32)

    def part(rows: slice) -> int:
        struct, _keep = _struct(grid, rows)
        return native.call(
            "ggml_ext_gptq_grid",
            struct,
            rows.stop - rows.start,
            native.floats(w[rows]),
            native.floats(u),
            native.bytes_(levels[rows]),
            native.floats(err[rows]),
            native.floats(cost[rows]),
        )

    _over_rows(part, len(w), threads)
    return levels, err, cost


def joint_block(type_name: str) -> int:
    """Weights per block of a type that ``gptq_joint`` knows, 0 for others."""
    return _JOINT.get(type_name, (0, 0))[0]


def gptq_joint(
    type_name: str, w: Floats, u: Floats, u_inv: Floats, threads: int
) -> tuple[Bytes, Floats, Floats]:
    """Rounds w [rows, n], one block per row, to FQ4 or FQ4_64, scale and table rows chosen jointly with the
    codes.

    u, u_inv float32 [n, n]: the factor and its inverse, which FQ4's refits of the scale read. Returns blocks
    uint8 [rows, block bytes], errors, costs. Raises GgmlExtError for NaN, Inf and weights beyond the type's
    range.
    """
    block_bytes = _JOINT[type_name][1]
    w, u, u_inv = (np.ascontiguousarray(array, np.float32) for array in (w, u, u_inv))
    inverse = [native.floats(u_inv)] if type_name == "fq4" else []
    blocks, err = np.empty((len(w), block_bytes), np.uint8), np.empty(w.shape, np.float32)
    cost = np.empty(len(w), np.float32)

    def part(rows: slice) -> int:
        return native.call(
            f"ggml_ext_gptq_{type_name}",
            rows.stop - rows.start,
            native.floats(w[rows]),
            native.floats(u),
            *inverse,
            native.bytes_(blocks[rows]),
            block_bytes,
            native.floats(err[rows]),
            native.floats(cost[rows]),
        )

    _over_rows(part, len(w), threads)
    return blocks, err, cost


def descend(grid: Grid, w: Floats, hessian: Floats, sweeps: int, threads: int) -> tuple[Grid, int]:
    """Coordinate descent from the grid's levels. hessian float32 [n, n], symmetric. Returns the grid with
    the new levels and the number of changes."""
    w, h = np.ascontiguousarray(w, np.float32), np.ascontiguousarray(hessian, np.float32)
    levels = grid.levels.copy()

    def part(rows: slice) -> int:
        struct, _keep = _struct(grid, rows)
        return native.call(
            "ggml_ext_descend",
            struct,
            rows.stop - rows.start,
            native.floats(w[rows]),
            native.floats(h),
            sweeps,
            native.bytes_(levels[rows]),
        )

    changes = _over_rows(part, len(w), threads)
    return grid.with_levels(levels), changes


def _struct(grid: Grid, rows: slice) -> tuple[object, list[NDArray[np.generic]]]:
    """A struct ggml_ext_grid for some rows, and the arrays that it points to."""
    arrays: list[NDArray[np.generic]] = [
        np.ascontiguousarray(grid.books, np.float32),
        np.ascontiguousarray(grid.scale[rows], np.float32),
        np.ascontiguousarray(grid.offset[rows], np.float32),
        np.ascontiguousarray(grid.book[rows], np.uint8),
    ]
    struct = native.new(
        "struct ggml_ext_grid",
        n=grid.levels.shape[1],
        group=grid.group,
        n_levels=grid.books.shape[1],
        n_books=len(grid.books),
        books=native.floats(arrays[0]),
        scale=native.floats(arrays[1]),
        offset=native.floats(arrays[2]),
        book=native.bytes_(arrays[3]),
    )
    return struct, arrays


def _over_rows(part: Callable[[slice], int], n_rows: int, threads: int) -> int:
    """Sum of the results of ``part`` over chunks of rows. Raises GgmlExtError for a negative one."""
    chunks = [slice(first, min(first + _CHUNK_ROWS, n_rows)) for first in range(0, n_rows, _CHUNK_ROWS)]
    with ThreadPoolExecutor(threads or processors()) as pool:
        results = list(pool.map(part, chunks))
    for rows, result in zip(chunks, results, strict=True):
        if result < 0:
            raise GgmlExtError(
                f"rounding failed with {native.error_name(result)} in rows {rows.start} to {rows.stop - 1}; "
                "the weights or the type must change"
            )
    return sum(results)
