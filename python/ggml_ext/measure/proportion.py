"""Errors of shares of right answers, and of the difference between two models on the same cases."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggml_ext.measure.standard_error import NORMAL, Interval


@dataclass(frozen=True)
class Share:
    """A share, its 95 % interval, and half the interval's width over NORMAL as its error."""

    value: float
    error: float
    ci95: Interval


def _of(value: float, low: float, high: float) -> Share:
    return Share(value, (high - low) / (2 * NORMAL), (low, high))


def share(right: NDArray[np.bool_]) -> Share:
    """The share of ``right`` [n] with Wilson's interval (E. Wilson, J. Am. Stat. Assoc. 22, 1927), which
    holds for shares of 0 and 1 and for few cases as well. Cases are taken for independent."""
    n, z = len(right), NORMAL
    value = float(np.mean(right))
    centre = (value + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(value * (1 - value) / n + z * z / (4 * n * n))
    return _of(value, max(0.0, centre - half), min(1.0, centre + half))


def difference(right: NDArray[np.bool_], base: NDArray[np.bool_]) -> Share:
    """The share of ``right`` [n] less that of ``base`` [n], the same cases.

    Only cases with different answers count: with g that ``right`` alone has and l that ``base`` alone has,
    p = (g + 1) / (n + 2), q = (l + 1) / (n + 2), the interval is
    p - q -+ z sqrt((p + q - (p - q)^2) / (n + 2)) (D. Bonett, R. Price, J. Educ. Behav. Stat. 37, 2012).
    It never has the width 0.
    """
    n = len(right)
    gained, lost = int(np.sum(right & ~base)), int(np.sum(base & ~right))
    p, q = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = NORMAL * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return _of((gained - lost) / n, max(-1.0, p - q - half), min(1.0, p - q + half))


def mean(values: NDArray[Any]) -> tuple[float, float | None]:
    """Mean of ``values`` [n] of independent cases and its standard error, None for a single one."""
    count = len(values)
    error = float(np.std(values, ddof=1) / math.sqrt(count)) if count > 1 else None
    return float(np.mean(values)), error
