"""Which type each tensor gets when the size of the whole is given: the smallest sum of losses that fits.

Losses add up (losses.py), so this is a choice of one option per tensor under one bound. With a price per byte
(a Lagrange multiplier) every tensor chooses for itself, and only options on the lower convex hull of its
(bytes, loss) are ever chosen; the price falls until no more fits, and what is left goes to the steps that
still fit, the best first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ggml_ext.core.errors import GgmlExtError


@dataclass(frozen=True)
class Option:
    """A type that a tensor can have. ``n_bytes``: of the tensor in it."""

    type_name: str
    n_bytes: int
    loss: float


class TooSmallError(GgmlExtError):
    """Not even the smallest options fit. ``least``: their bytes."""

    def __init__(self, least: int) -> None:
        super().__init__(f"the smallest types take {least} bytes")
        self.least = least


def allocate(options: Mapping[str, Sequence[Option]], n_bytes: int) -> dict[str, str]:
    """Tensor -> type, at most ``n_bytes`` in all. Raises TooSmallError."""
    hulls = {name: hull(its) for name, its in options.items()}
    chosen = dict.fromkeys(hulls, 0)
    left = n_bytes - sum(its[0].n_bytes for its in hulls.values())
    if left < 0:
        raise TooSmallError(n_bytes - left)
    # Along a hull the gain per byte falls, so by falling gain a tensor's steps come in their order.
    steps = sorted(
        (
            (-_gain(low, high), name, k)
            for name, its in hulls.items()
            for k, (low, high) in enumerate(pairwise(its), 1)
        ),
    )
    for _, name, k in steps:
        its = hulls[name]
        cost = its[k].n_bytes - its[chosen[name]].n_bytes
        if chosen[name] == k - 1 and cost <= left:
            chosen[name], left = k, left - cost
    return {name: hulls[name][k].type_name for name, k in chosen.items()}


def hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull, from the fewest bytes to the least loss."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda its: (its.n_bytes, its.loss)):
        if kept and option.loss >= kept[-1].loss:
            continue
        while len(kept) > 1 and _gain(kept[-2], kept[-1]) <= _gain(kept[-1], option):
            kept.pop()
        kept.append(option)
    return kept


def _gain(low: Option, high: Option) -> float:
    """What a byte more buys."""
    return (low.loss - high.loss) / (high.n_bytes - low.n_bytes)
