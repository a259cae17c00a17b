"""FQ4: 256 weights in 138 bytes, an fp16 scale, a table of 16 values per row; see fq4_blocks.py.

The code of weight 128 h + j (h = 0..1, j = 0..63) is the low nibble of q[64 h + j], that of weight
128 h + 64 + j the high one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggml_ext.gguf.fq4_blocks import HalfScales, Nibbles
from ggml_ext.gguf.fq4_search import Bytes, Floats, Table

__all__ = [
    "BLOCK",
    "BLOCK_BYTES",
    "LAYOUT",
    "TABLE",
    "dequantize",
    "dot_q8_k",
    "quantize",
    "quantize_blocks",
    "quantize_q8_k",
]

# Eight shapes from narrow to wide and from even to peaked, learnt on Gaussian, Student-t and real weights
# (scripts/fq4_table.py).
NEAREST = Table(
    [
        [-44, -35, -28, -21, -16, -10, -6, -1, 3, 8, 13, 19, 25, 32, 41, 53],
        [-68, -49, -38, -29, -21, -14, -8, -1, 5, 11, 17, 23, 31, 39, 48, 60],
        [-65, -53, -43, -33, -25, -17, -10, -2, 5, 12, 19, 27, 35, 45, 56, 72],
        [-81, -58, -47, -37, -27, -18, -10, -2, 6, 14, 22, 31, 41, 51, 62, 77],
        [-94, -66, -51, -39, -29, -19, -11, -2, 6, 14, 23, 32, 42, 53, 68, 85],
        [-90, -72, -57, -44, -33, -23, -13, -3, 6, 15, 25, 35, 47, 60, 79, 99],
        [-107, -73, -57, -44, -32, -21, -12, -2, 8, 18, 28, 39, 51, 66, 85, 111],
        [-127, -81, -60, -44, -32, -20, -11, -2, 7, 16, 27, 38, 52, 70, 101, 127],
    ]
)

# int8 [16 rows, 16 codes], rows ascending; row 8 + r is row r mirrored and negated.
TABLE = NEAREST.values

BLOCK = 256  # weights per block
LAYOUT = HalfScales(BLOCK, NEAREST, Nibbles(BLOCK, 64))
BLOCK_BYTES = LAYOUT.n_bytes

quantize, quantize_blocks, dequantize = LAYOUT.quantize, LAYOUT.quantize_blocks, LAYOUT.dequantize


def dot_q8_k(row: Bytes, x: NDArray[Any], layout: HalfScales = LAYOUT) -> np.float32:
    """Dot product of one row, uint8 [bytes], with x float32 [k], which is rounded to Q8_K first."""
    d_x, quants = quantize_q8_k(np.asarray(x, np.float32))
    blocks = layout.blocks(row[None])
    sums = (layout.decode(blocks).astype(np.int32) * quants).sum(1)
    total = np.float32(0)
    for d, d_y, isum in zip(layout.scales(blocks), d_x, sums.astype(np.float32), strict=True):
        total += d * d_y * isum
    return total


def quantize_q8_k(x: Floats) -> tuple[Floats, NDArray[np.int8]]:
    """Upstream's activation type Q8_K (quantize_row_q8_K_ref): x float32 [k] -> scales float32 [k / 256] and
    quants int8 [k / 256, 256]."""
    blocks = x.reshape(-1, BLOCK)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    zero = largest == 0
    inverse = np.where(zero, 0, np.float32(-127) / np.where(zero, 1, largest)).astype(np.float32)
    quants = np.minimum(127, np.rint(inverse * blocks)).astype(np.int8)
    scales = np.where(zero, 0, np.float32(1) / np.where(zero, 1, inverse)).astype(np.float32)
    return scales[:, 0], quants
