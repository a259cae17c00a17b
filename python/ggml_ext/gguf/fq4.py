"""FQ4 in plain numpy: slow, readable, bit for bit what ggml_ext/fq4/fq4.c computes.

A block is 256 weights in 138 bytes, little endian: d (fp16), s[8], q[128], with w = d * TABLE[s, q].
Sub-block b (0..15) holds the weights 16 b .. 16 b + 15; its row index s is the low nibble of s[b // 2] for
even b, the high nibble for odd b. The code of weight 128 h + j (h = 0..1, j = 0..63) is the low nibble of
q[64 h + j], that of weight 128 h + 64 + j the high one. docs/gguf.md is the specification.

Every float operation is a float32 one in the order of the C source; sums therefore run one term at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggml_ext.gguf.fq4_search import (
    SUB,
    TABLE,
    Bytes,
    Choice,
    Floats,
    choose,
    error_weights,
    no_choice,
    refit_d,
)

__all__ = [
    "BLOCK",
    "BLOCK_BYTES",
    "TABLE",
    "dequantize",
    "dot_q8_k",
    "quantize",
    "quantize_blocks",
    "quantize_q8_k",
]

BLOCK = 256  # weights per block
BLOCK_BYTES = 138

_N_SUBS = BLOCK // SUB
_DTYPE = np.dtype([("d", "<f2"), ("s", "u1", _N_SUBS // 2), ("q", "u1", BLOCK // 2)])

# First guesses of d, as d = factor * absmax / 127; then the number of least-squares refits. docs/fq4.md,
# "candidates".
_FACTORS = np.array([0.9, 0.95, 1, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3], np.float32)
_N_REFITS = 2

_FP16_MAX = np.float32(65504)
_MAX_WEIGHT = np.float32(6e6)  # beyond it d would not fit fp16: 1.3 * 6e6 / 127 < 65504

# Blocks per step of quantize_blocks: bounds the temporary arrays to a few MB.
_STEP = 64


def quantize(rows: NDArray[Any], imatrix: NDArray[Any] | None = None) -> Bytes:
    """rows [n, k], k a multiple of 256, importances [k] >= 0 or None -> uint8 [n, k / 256 * 138].

    A block with a NaN, with weights beyond 6e6, or with importances that make the error overflow a float,
    gets d = NaN. Raises ValueError for a row length that is no
    multiple of 256.
    """
    n, k = rows.shape
    blocks = np.ascontiguousarray(rows, np.float32).reshape(n * (k // BLOCK), BLOCK)
    if imatrix is None:
        return quantize_blocks(blocks).reshape(n, -1)
    importances = np.broadcast_to(np.asarray(imatrix, np.float32), (n, k)).reshape(blocks.shape)
    return quantize_blocks(blocks, importances).reshape(n, -1)


def quantize_blocks(x: Floats, importances: Floats | None = None) -> Bytes:
    """x float32 [n, 256], importances [n, 256] >= 0 or None -> uint8 [n, 138]."""
    out = np.zeros(len(x), _DTYPE)
    # Infinite and NaN costs lose every comparison; they need no warning.
    with np.errstate(all="ignore"):
        weights = np.ones_like(x) if importances is None else error_weights(importances)
        for start in range(0, len(x), _STEP):
            part = slice(start, start + _STEP)
            out[part] = _encode(
                x[part].reshape(-1, _N_SUBS, SUB).astype(np.float32),
                weights[part].reshape(-1, _N_SUBS, SUB).astype(np.float32),
            )
    return out.view(np.uint8).reshape(len(x), BLOCK_BYTES)


def dequantize(data: Bytes) -> Floats:
    """uint8 [n, k / 256 * 138] -> float32 [n, k]."""
    blocks = _blocks(data)
    d = blocks["d"].astype(np.float32)
    out: Floats = d[:, None] * _decode(blocks).astype(np.float32)
    return out.reshape(len(data), -1)


def dot_q8_k(row: Bytes, x: NDArray[Any]) -> np.float32:
    """Dot product of one row, uint8 [k / 256 * 138], with x float32 [k], which is rounded to Q8_K first."""
    d_x, quants = quantize_q8_k(np.asarray(x, np.float32))
    blocks = _blocks(row[None])
    sums = (_decode(blocks).astype(np.int32) * quants).sum(1)
    total = np.float32(0)
    for d, d_y, isum in zip(blocks["d"].astype(np.float32), d_x, sums.astype(np.float32), strict=True):
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


def _blocks(data: Bytes) -> NDArray[np.void]:
    return np.ascontiguousarray(data).reshape(-1, BLOCK_BYTES).view(_DTYPE)[:, 0]


def _decode(blocks: NDArray[np.void]) -> NDArray[np.int8]:
    """TABLE[s, q] of every weight: int8 [n, 256]."""
    n = len(blocks)
    rows = np.stack([blocks["s"] & 15, blocks["s"] >> 4], -1).reshape(n, _N_SUBS)
    halves = blocks["q"].reshape(n, 2, 64)
    codes = np.stack([halves & 15, halves >> 4], 2).reshape(n, _N_SUBS, SUB)
    return TABLE[rows[..., None], codes].reshape(n, BLOCK)


def _encode(x: Floats, weight: Floats) -> NDArray[np.void]:
    """x, weight [n, 16, 16] -> blocks [n]."""
    n = len(x)
    amax = np.abs(x).max((1, 2))
    valid = amax <= _MAX_WEIGHT  # false for NaN
    x = np.where(valid[:, None, None], x, np.float32(0))
    best = no_choice(n, _N_SUBS)
    for factor in _FACTORS:
        best.improve(choose(x, weight, _round_d(amax * (factor / np.float32(127)))))
    for _ in range(_N_REFITS):
        best.improve(choose(x, weight, _round_d(refit_d(x, weight, best))))
    blocks = _pack(best)
    overflowed = (best.d == 0) & (_round_d(amax * (_FACTORS[-1] / np.float32(127))) > 0)
    refused = ~valid | overflowed
    blocks[refused] = np.zeros((), _DTYPE)
    blocks["d"][refused] = np.nan
    return blocks


def _round_d(d: Floats) -> Floats:
    """To the nearest fp16 (ties to even), at most the largest one."""
    return np.where(d < _FP16_MAX, d, _FP16_MAX).astype(np.float16).astype(np.float32)


def _pack(choice: Choice) -> NDArray[np.void]:
    n = len(choice.d)
    blocks = np.zeros(n, _DTYPE)
    blocks["d"] = choice.d
    blocks["s"] = choice.row[:, 0::2] | choice.row[:, 1::2] << 4
    codes = choice.codes().reshape(n, 2, 2, 64)
    blocks["q"] = (codes[:, :, 0] | codes[:, :, 1] << 4).reshape(n, BLOCK // 2)
    return blocks
