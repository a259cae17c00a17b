"""What the types FQ4, FQ4_64, FQ3 and FQ3_64 share, in plain numpy: the encoders' search for rows and codes,
bit for bit what ggml_ext/fq4/fq4_encode.c computes. A block is s sub-blocks of 16 weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SUB = 16  # weights per sub-block

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

# An importance counts as at least this part of its block's mean.
_IMPORTANCE_FLOOR = np.float32(1e-4)

_N_CELLS = 512


class Table:
    """Rows of ascending values, ``values`` int8 [16, n]: ``shapes`` [8, n], then these mirrored and negated.

    Cell c holds t = w / d with c / 2 - 128 <= t < (c + 1) / 2 - 128. The midpoint of two int8 is a multiple
    of 1 / 2, so inside a cell the nearest value is constant: ``nearest_code``, ``nearest_value``
    [512 cells, 16 rows]."""

    def __init__(self, shapes: list[list[int]]) -> None:
        first = np.array(shapes, np.int8)
        self.values = np.concatenate([first, -first[:, ::-1]])
        middles = 2 * np.arange(_N_CELLS)[:, None, None] - 511  # four times the middle of the cell
        midpoints = 2 * (self.values[:, :-1].astype(int) + self.values[:, 1:])  # likewise
        self.nearest_code = (midpoints < middles).sum(-1).astype(np.uint8)
        codes = self.nearest_code[..., None].astype(int)
        self.nearest_value = np.take_along_axis(self.values[None], codes, -1)[..., 0].astype(np.float32)


@dataclass
class Choice:
    """Encodings of n blocks of s sub-blocks: d [n] as a block can hold it, cost [n] = sum of weight *
    error^2, row [n, s] per sub-block, cell [n, s, 16] per weight."""

    table: Table
    d: Floats
    cost: Floats
    row: NDArray[np.intp]
    cell: NDArray[np.intp]

    def improve(self, other: Choice) -> None:
        """Takes over the blocks whose cost in ``other`` is lower."""
        better = other.cost < self.cost
        for mine, theirs in (
            (self.d, other.d),
            (self.cost, other.cost),
            (self.row, other.row),
            (self.cell, other.cell),
        ):
            mine[better] = theirs[better]

    def _gather(self, table: NDArray[Any]) -> NDArray[Any]:
        """table [512 cells, 16 rows] at the chosen cells and rows: [n, s, 16]."""
        return table[self.cell, self.row[..., None]]

    def values(self) -> Floats:
        """The table values [n, s, 16] of the weights."""
        return self._gather(self.table.nearest_value)

    def codes(self) -> NDArray[np.uint8]:
        """The codes [n, s, 16] of the weights."""
        return self._gather(self.table.nearest_code)


def no_choice(table: Table, n: int, n_subs: int) -> Choice:
    """What any encoding beats: d = 0 at infinite cost."""
    return Choice(
        table,
        np.zeros(n, np.float32),
        np.full(n, np.inf, np.float32),
        np.zeros((n, n_subs), np.intp),
        np.zeros((n, n_subs, SUB), np.intp),
    )


def error_weights(importances: Floats) -> Floats:
    """Weights of the squared errors [n, block]: the importances with their floor, ones where all are zero."""
    total = np.zeros(len(importances), np.float32)
    block = importances.shape[1]
    for i in range(block):
        total += importances[:, i]
    floor = total * (_IMPORTANCE_FLOOR / np.float32(block))
    weights = np.maximum(importances, floor[:, None])
    return np.where(total[:, None] > 0, weights, np.float32(1)).astype(np.float32)


def choose(table: Table, x: Floats, weight: Floats, d: Floats) -> Choice:
    """The best row of each sub-block for d [n], which blocks must be able to hold, and the cells of the
    weights. x, weight [n, s, 16]. A d of 0 is no candidate: its cost is infinite."""
    inverse = np.float32(1) / np.where(d > 0, d, np.float32(1))
    t = x * inverse[:, None, None]
    cell = np.minimum(np.maximum(t * np.float32(2) + np.float32(256), 0), 511).astype(np.intp)
    cost = np.zeros((*x.shape[:2], 16), np.float32)
    for i in range(SUB):
        error = t[:, :, i, None] - table.nearest_value[cell[:, :, i]]
        cost += weight[:, :, i, None] * error * error
    row = cost.argmin(-1)
    lowest = np.take_along_axis(cost, row[..., None], -1)[..., 0]
    total = np.zeros(len(x), np.float32)
    for b in range(x.shape[1]):
        total += lowest[:, b]
    return Choice(table, d, np.where(d > 0, total * (d * d), np.float32(np.inf)), row, cell)


def refit_d(x: Floats, weight: Floats, choice: Choice) -> Floats:
    """The d [n] that minimises the weighted squared error for the chosen rows and codes; 0 if none does."""
    value = choice.values()
    weighted = weight * value
    num = np.zeros((len(x), SUB), np.float32)
    den = np.zeros((len(x), SUB), np.float32)
    for b in range(x.shape[1]):
        num += weighted[:, b] * x[:, b]
        den += weighted[:, b] * value[:, b]
    for i in range(1, SUB):
        num[:, 0] += num[:, i]
        den[:, 0] += den[:, i]
    return np.where(den[:, 0] > 0, num[:, 0] / den[:, 0], np.float32(0))
