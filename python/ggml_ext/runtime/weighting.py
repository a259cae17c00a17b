"""Importances that every type's encoder can use.

ggml's encoders minimise the weighted error of a block in float32. Where all its importances are 0 that error
is 0 whatever the codes, and most types then write zeros; where they are tiny, their products become 0. So no
importance counts less than FLOOR of the largest in its block, and blocks whose largest lies far from 1
are scaled: importances count relative to each other within a block only, and a power of two changes no bit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FLOOR = np.float32(2.0**-20)

_RANGE = 2.0**40  # products of three importances and of weights squared stay within float32

_BLOCK, _SMALL_BLOCK = 256, 32  # of the K and IQ types, of the others


def usable(importances: NDArray[np.float32]) -> NDArray[np.float32]:
    """Importances [..., row length], finite and >= 0, as the encoders can use them: positive, float32.

    Returns the argument itself where nothing had to change. A block without any importance gets equal ones.
    """
    blocks = _blocks(importances)
    top = blocks.max(axis=-1, keepdims=True, initial=0)
    far = (top > 0) & ((top < 1 / _RANGE) | (top > _RANGE))
    low = blocks < top * FLOOR
    if not (far.any() or low.any() or (top == 0).any()):
        return importances
    _, exponent = np.frexp(np.where(far, top, np.float32(1)))
    scale = np.where(far, exponent, 0)
    raised = np.maximum(np.ldexp(blocks, -scale), np.ldexp(top, -scale) * FLOOR)
    return np.where(top > 0, raised, np.float32(1)).astype(np.float32).reshape(importances.shape)


def n_raised(importances: NDArray[np.float32]) -> int:
    """How many of the importances ``usable`` raises: those that are 0, or next to it beside their block's."""
    blocks = _blocks(importances)
    top = blocks.max(axis=-1, keepdims=True, initial=0)
    return int(np.count_nonzero((blocks < top * FLOOR) | (top == 0)))


def _blocks(importances: NDArray[np.float32]) -> NDArray[np.float32]:
    row = importances.shape[-1]
    for block in (_BLOCK, _SMALL_BLOCK):
        if row and row % block == 0:
            return importances.reshape(*importances.shape[:-1], -1, block)
    return importances[..., None, :]
