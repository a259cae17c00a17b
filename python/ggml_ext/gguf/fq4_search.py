"""What FQ4 and FQ4_64 share, in plain numpy: the table, and the encoders' search for rows and codes, bit for
bit what ggml_ext/fq4/fq4_encode.c computes. A block is s sub-blocks of 16 weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SUB = 16  # weights per sub-block

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

# Eight shapes from narrow to wide and from even to peaked, learnt on Gaussian, Student-t and real weights
# (scripts/fq4_table.py).
_SHAPES = np.array(
    [
        [-44, -35, -28, -21, -16, -10, -6, -1, 3, 8, 13, 19, 25, 32, 41, 53],
        [-68, -49, -38, -29, -21, -14, -8, -1, 5, 11, 17, 23, 31, 39, 48, 60],
        [-65, -53, -43, -33, -25, -17, -10, -2, 5, 12, 19, 27, 35, 45, 56, 72],
        [-81, -58, -47, -37, -27, -18, -10, -2, 6, 14, 22, 31, 41, 51, 62, 77],
        [-94, -66, -51, -39, -29, -19, -11, -2, 6, 14, 23, 32, 42, 53, 68, 85],
        [-90, -72, -57, -44, -33, -23, -13, -3, 6, 15, 25, 35, 47, 60, 79, 99],
        [-107, -73, -57, -44, -32, -21, -12, -2, 8, 18, 28, 39, 51, 66, 85, 111],
        [-127, -81, -60, -44, -32, -20, -11, -2, 7, 16, 27, 38, 52, 70, 101, 127],
    ],
    dtype=np.int8,
)

# int8 [16 rows, 16 codes], rows ascending; row 8 + r is row r mirrored and negated.
TABLE = np.concatenate([_SHAPES, -_SHAPES[:, ::-1]])

# An importance counts as at least this part of its block's mean.
_IMPORTANCE_FLOOR = np.float32(1e-4)

# Cell c holds t = w / d with c / 2 - 128 <= t < (c + 1) / 2 - 128. The midpoint of two int8 is a multiple of
# 1 / 2, so inside a cell the nearest table value is constant: _CODES, _VALUES [512 cells, 16 rows].
_N_CELLS = 512
_MIDDLES = 2 * np.arange(_N_CELLS)[:, None, None] - 511  # four times the middle of the cell
_MIDPOINTS = 2 * (TABLE[:, :-1].astype(int) + TABLE[:, 1:])  # likewise
_CODES = (_MIDPOINTS < _MIDDLES).sum(-1).astype(np.uint8)
_VALUES = np.take_along_axis(TABLE[None], _CODES[..., None].astype(int), -1)[..., 0].astype(np.float32)


@dataclass
class Choice:
    """Encodings of n blocks of s sub-blocks: d [n] as a block can hold it, cost [n] = sum of weight *
    error^2, row [n, s] per sub-block, cell [n, s, 16] per weight."""

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
        return self._gather(_VALUES)

    def codes(self) -> NDArray[np.uint8]:
        """The codes [n, s, 16] of the weights."""
        return self._gather(_CODES)


def no_choice(n: int, n_subs: int) -> Choice:
    """What any encoding beats: d = 0 at infinite cost."""
    return Choice(
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


def choose(x: Floats, weight: Floats, d: Floats) -> Choice:
    """The best row of each sub-block for d [n], which blocks must be able to hold, and the cells of the
    weights. x, weight [n, s, 16]. A d of 0 is no candidate: its cost is infinite."""
    inverse = np.float32(1) / np.where(d > 0, d, np.float32(1))
    t = x * inverse[:, None, None]
    cell = np.minimum(np.maximum(t * np.float32(2) + np.float32(256), 0), 511).astype(np.intp)
    cost = np.zeros((*x.shape[:2], 16), np.float32)
    for i in range(SUB):
        error = t[:, :, i, None] - _VALUES[cell[:, :, i]]
        cost += weight[:, :, i, None] * error * error
    row = cost.argmin(-1)
    lowest = np.take_along_axis(cost, row[..., None], -1)[..., 0]
    total = np.zeros(len(x), np.float32)
    for b in range(x.shape[1]):
        total += lowest[:, b]
    return Choice(d, np.where(d > 0, total * (d * d), np.float32(np.inf)), row, cell)


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
