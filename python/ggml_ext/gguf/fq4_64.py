"""FQ4_64 in plain numpy: slow, readable, bit for bit what ggml_ext/fq4_64/fq4_64.c computes.

A block is 64 weights in 35 bytes: d, s[2], q[32], with w = SCALES[d] * TABLE[s, q], FQ4's table. Sub-block
b (0..3) holds the weights 16 b .. 16 b + 15; its row index s is the low nibble of s[b // 2] for even b, the
high nibble for odd b. The code of weight j (0..31) is the low nibble of q[j], that of weight 32 + j the high
one. docs/gguf.md is the specification.
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

BLOCK = 64  # weights per block
BLOCK_BYTES = 35

_N_SUBS = BLOCK // SUB
_DTYPE = np.dtype([("d", "u1"), ("s", "u1", _N_SUBS // 2), ("q", "u1", BLOCK // 2)])

_NAN = 255


def _make_scales() -> Floats:
    byte = np.arange(256)
    scales = np.ldexp(1 + byte % 8 / 8, byte // 8 - 24).astype(np.float32)
    scales[0], scales[_NAN] = 0, np.nan
    return scales


# float32 [256]: the scale of each byte.
SCALES = _make_scales()

# First guesses of d: consecutive scales from that of factor * absmax / 127 on; then the number of
# least-squares refits. docs/fq4_64.md, "Encoder".
_FIRST_FACTOR = np.float32(0.95)
_N_GUESSES = 8
_N_REFITS = 2

_MAX_WEIGHT = np.float32(2e4)


def quantize(rows: NDArray[Any], imatrix: NDArray[Any] | None = None) -> Bytes:
    """rows [n, k], k a multiple of 64, importances [k] >= 0 or None -> uint8 [n, k / 64 * 35].

    A block with a NaN, with weights beyond 2e4, or with importances that make the error overflow a float,
    gets d = NaN. Raises ValueError for a row length that is no multiple of 64.
    """
    n, k = rows.shape
    blocks = np.ascontiguousarray(rows, np.float32).reshape(n * (k // BLOCK), BLOCK)
    # Infinite and NaN costs lose every comparison; they need no warning.
    with np.errstate(all="ignore"):
        if imatrix is None:
            weights = np.ones_like(blocks)
        else:
            importances = np.broadcast_to(np.asarray(imatrix, np.float32), (n, k)).reshape(blocks.shape)
            weights = error_weights(importances)
        encoded = _encode(blocks.reshape(-1, _N_SUBS, SUB), weights.reshape(-1, _N_SUBS, SUB))
    return encoded.view(np.uint8).reshape(n, -1)


def dequantize(data: Bytes) -> Floats:
    """uint8 [n, k / 64 * 35] -> float32 [n, k]."""
    blocks = np.ascontiguousarray(data).reshape(-1, BLOCK_BYTES).view(_DTYPE)[:, 0]
    rows = np.stack([blocks["s"] & 15, blocks["s"] >> 4], -1).reshape(-1, _N_SUBS)
    codes = np.stack([blocks["q"] & 15, blocks["q"] >> 4], 1).reshape(-1, _N_SUBS, SUB)
    values = TABLE[rows[..., None], codes].reshape(-1, BLOCK).astype(np.float32)
    out: Floats = SCALES[blocks["d"]][:, None] * values
    return out.reshape(len(data), -1)


def _encode(x: Floats, weight: Floats) -> NDArray[np.void]:
    """x, weight [n, 4, 16] -> blocks [n]."""
    n = len(x)
    largest = np.abs(x).max((1, 2))
    valid = largest <= _MAX_WEIGHT  # false for NaN
    x = np.where(valid[:, None, None], x, np.float32(0))
    largest = np.where(valid, largest, np.float32(0))
    first = round_d(largest * (_FIRST_FACTOR / np.float32(127)))
    best = no_choice(n, _N_SUBS)
    for guess in range(_N_GUESSES):
        best.improve(choose(x, weight, SCALES[np.where(first > 0, np.minimum(first + guess, 254), 0)]))
    for _ in range(_N_REFITS):
        best.improve(choose(x, weight, SCALES[np.where(best.d > 0, round_d(refit_d(x, weight, best)), 0)]))
    blocks = _pack(best)
    refused = ~valid | ((first > 0) & (best.d == 0))
    blocks[refused] = np.zeros((), _DTYPE)
    blocks["d"][refused] = _NAN
    return blocks


def round_d(d: Floats) -> NDArray[np.intp]:
    """The byte of the nearest scale (ties to the even one), at most the largest; 0 for nearer to 0."""
    bits = d.astype(np.float32).view(np.uint32).astype(np.int64)
    rounded = ((bits + 0x7FFFF + (bits >> 20 & 1)) >> 20) - ((127 - 24) << 3)
    inside = np.where(d < SCALES[254], np.maximum(rounded, 1), 254)
    return np.where(d > np.float32(0.5) * SCALES[1], inside, 0).astype(np.intp)


def _pack(choice: Choice) -> NDArray[np.void]:
    n = len(choice.d)
    blocks = np.zeros(n, _DTYPE)
    blocks["d"] = round_d(choice.d)
    blocks["s"] = choice.row[:, 0::2] | choice.row[:, 1::2] << 4
    codes = choice.codes().reshape(n, 2, BLOCK // 2)
    blocks["q"] = codes[:, 0] | codes[:, 1] << 4
    return blocks
