"""GPTQ (arXiv 2210.17323) onto block types whose scales are chosen on the way, then coordinate descent.

Columns are rounded block by block from left to right. A block's scales are chosen for the weights as they
stand then, with the errors of all earlier columns already passed on; of several candidates each row keeps
the one whose rounded block costs least in GPTQ's own measure, the sum of e_j^2. docs/rounding.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.methods.rounding import grid as grids
from ggml_ext.methods.rounding.grid import Bytes, Floats
from ggml_ext.methods.rounding.hessian import Hessian
from ggml_ext.methods.rounding.kernels import descend, gptq_grid, gptq_joint, joint_block
from ggml_ext.runtime import native

_COLUMNS = 256  # per step, or one block where blocks are larger
_SWEEPS = 4
_FACTORS = (0.92, 0.96, 1.04, 1.08)  # on the fp16 scales of the best candidate


def encode(
    w: Floats,
    type_name: str,
    hessian: Hessian,
    *,
    threads: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Bytes:
    """Encodes w float32 [rows, n] for inputs with the second moments ``hessian``.

    progress is called with the number of weights done. Raises GgmlExtError if the type has no grid of
    levels, the rows do not fit its blocks, or weights or moments are not finite.
    """
    rows, n = w.shape
    if not grids.supports(type_name):
        known = ", ".join(grids.names())
        raise GgmlExtError(
            f"rounding gptq: no level grid for type {type_name}; use one of {known}, or imatrix"
        )
    if n % grids.block_size(type_name):
        raise GgmlExtError(f"rounding gptq: rows of {n} weights do not fit the blocks of {type_name}")
    if not (np.isfinite(w).all() and hessian.finite):
        raise GgmlExtError("rounding gptq: NaN or Inf among the weights or activations; the model is damaged")
    factors = hessian.factors
    left = w.astype(np.float32, copy=True)
    data = np.empty((rows, native.row_size(type_name, n)), np.uint8)
    for first, last in _steps(n, type_name):
        at = slice(native.row_size(type_name, first) if first else 0, native.row_size(type_name, last))
        u, u_inv = factors.block(first, last)
        data[:, at], err = _round_columns(left[:, first:last], type_name, u, u_inv, threads)
        left[:, last:] -= err @ factors.u[first:last, last:]
        if progress is not None:
            progress(rows * (last - first))
    return _polish(w, type_name, data, hessian, threads)


def _steps(n: int, type_name: str) -> Iterator[tuple[int, int]]:
    block = grids.block_size(type_name)
    step = joint_block(type_name) or max(block, _COLUMNS // block * block)
    for first in range(0, n, step):
        yield first, min(first + step, n)


def _round_columns(
    w: Floats, type_name: str, u: Floats, u_inv: Floats, threads: int
) -> tuple[Bytes, NDArray[np.float32]]:
    if joint_block(type_name):
        data, err, _ = gptq_joint(type_name, w, u, u_inv, threads)
        return data, err
    best_data, best_err, best_cost = _rounded(w, type_name, _encoded(w, type_name, None, threads), u, threads)

    def offer(data: Bytes) -> None:
        data, err, cost = _rounded(w, type_name, data, u, threads)
        better = cost < best_cost
        best_data[better], best_err[better], best_cost[better] = data[better], err[better], cost[better]

    for importance in (1 / np.square(u.diagonal()), np.square(u_inv).sum(1)):
        offer(_encoded(w, type_name, importance.astype(np.float32), threads))
    start = best_data.copy()
    for factor in _FACTORS:
        scaled = grids.rescale(type_name, start, factor)
        if (scaled != start).any():
            offer(scaled)
    return best_data, best_err


def _encoded(w: Floats, type_name: str, importance: Floats | None, threads: int) -> Bytes:
    return native.quantize(type_name, np.ascontiguousarray(w), importance, threads=threads)


def _rounded(w: Floats, type_name: str, data: Bytes, u: Floats, threads: int) -> tuple[Bytes, Floats, Floats]:
    levels, err, cost = gptq_grid(grids.decode(type_name, data), w, u, threads)
    return grids.encode(type_name, data, levels), err, cost


def _polish(w: Floats, type_name: str, data: Bytes, hessian: Hessian, threads: int) -> Bytes:
    """Coordinate descent on the error by the shrunk H, undamped; it can only lower it."""
    grid, changes = descend(grids.decode(type_name, data), w, hessian.shrunk, _SWEEPS, threads)
    return grids.encode(type_name, data, grid.levels) if changes else data
