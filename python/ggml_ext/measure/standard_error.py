"""Standard errors of means over the scored tokens of a text, whose tokens and windows are correlated.

Neighbouring tokens share a topic and a style, so the mean over n tokens is known much less well than from n
independent ones, and windows are no independent draws either: they are consecutive pieces of one text. The
variance of a mean is the spectrum of the series at frequency zero. It is estimated from the lowest
frequencies: the series is weighted with ``df`` cosines of 1, 2, ... half periods over the whole text, and
the squares of these sums are averaged; the mean divided by the root follows Student's t with ``df`` degrees
of freedom (E. Lazarus, D. Lewis, J. Stock, M. Watson, "HAR inference: recommendations for practice", Journal
of Business & Economic Statistics 36, 2018; U. Müller, Journal of Econometrics 141, 2007).

With few windows even the lowest cosines lie above the frequencies that matter, so the estimate is multiplied
by what it loses for a reference text, whose correlation falls as exp(-distance / REFERENCE_TOKENS).
docs/compare.md has the derivation and the measured coverage.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]

NORMAL = 1.959964
"""97.5 % quantile of the normal distribution: an interval is the mean -+ NORMAL times the error."""

REFERENCE_TOKENS = 560.0
"""Correlation length of the reference text: windows of 512 tokens correlate by 0.4 with the next one."""

SPAN_TOKENS = 512
"""The number of cosines follows the length of the text in these, whatever the length of a window."""

PIECE_TOKENS = 256
"""A longer row of scored tokens is cut into pieces of about this length."""


def student_quantile(df: int) -> float:
    """97.5 % quantile of Student's t, by bisection of its distribution (Abramowitz and Stegun 26.7.3 and 4).

    ``df``: degrees of freedom, at least 1.
    """
    low, high = 0.0, 13.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_within(middle, df) < 0.95 else (low, middle)
    return (low + high) / 2


def _student_within(t: float, df: int) -> float:
    """P(|T| < t)."""
    theta = math.atan2(t, math.sqrt(df))
    cosine, odd = math.cos(theta), df % 2
    term, total = cosine if odd else 1.0, 0.0
    for k in range(df // 2):
        total += term
        term *= cosine**2 * (2 * k + 1 + odd) / (2 * k + 2 + odd)
    return 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total


def independent_error(values: NDArray[Any]) -> float:
    """sqrt(var / (n - 1)) of ``values`` [n]: llama-perplexity's error, right for independent tokens only."""
    count = len(values)
    return float(np.std(values, dtype=np.float64) / math.sqrt(count - 1)) if count > 1 else 0.0


class TextErrors:
    """Errors of means over the tokens scored in ``windows`` consecutive windows of ``ctx`` tokens.

    ``rows``: scored tokens per window, the last but one of the window being the last of them.
    """

    def __init__(self, windows: int, rows: int, ctx: int) -> None:
        pieces = max(1, round(rows / PIECE_TOKENS))
        edges = np.linspace(0, rows, pieces + 1).round().astype(int)
        begins = np.arange(windows)[:, None] * ctx + (ctx - 1 - rows)
        self._starts = (np.arange(windows)[:, None] * rows + edges[:-1]).ravel()
        self._lengths = np.tile(np.diff(edges), windows)
        self._centres = (begins + (edges[:-1] + edges[1:]) / 2).ravel()
        wanted = max(2, round(0.6 * math.sqrt(windows * ctx / SPAN_TOKENS)))
        self.df = min(wanted, len(self._starts) // 2)
        """Degrees of freedom, the number of cosines; 0 for a text too short to tell an error."""

    @cached_property
    def _cosines(self) -> NDArray[np.float64]:
        """[df, pieces], each of unit square sum."""
        count = len(self._starts)
        phases = np.pi * np.outer(np.arange(1, self.df + 1), np.arange(count) + 0.5) / count
        return np.asarray(np.sqrt(2 / count) * np.cos(phases))

    @cached_property
    def _scale(self) -> float:
        """From the root mean square of the weighted sums of tokens to the error of their mean."""
        count = len(self._starts)
        # Variances of the reference text: of the sum over all pieces per piece, and of a weighted sum.
        total, weighted = 0.0, np.zeros(self.df)
        for i, centre in enumerate(self._centres):
            row = np.exp(-np.abs(self._centres - centre) / REFERENCE_TOKENS)
            total += row.sum() / count
            weighted += self._cosines[:, i] * (self._cosines @ row)
        lost = total / weighted.mean()
        widening = student_quantile(self.df) / NORMAL
        return float(widening * math.sqrt(lost * count) / self._lengths.sum())

    def errors(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Standard errors [...] of the means over the last axis of ``values`` [..., windows * rows].

        Widened by t(df) / NORMAL, so that the mean -+ NORMAL errors is the 95 % interval. Needs ``df`` > 0.
        """
        sums = np.add.reduceat(values, self._starts, axis=-1, dtype=np.float64)
        mean = sums.sum(axis=-1, keepdims=True) / self._lengths.sum()
        weighted = (sums - mean * self._lengths) @ self._cosines.T
        return np.asarray(self._scale * np.sqrt(np.square(weighted).mean(axis=-1)))

    def error(self, values: NDArray[Any]) -> float | None:
        """The error of the mean of ``values`` [windows * rows]; None where ``df`` is 0."""
        return float(self.errors(values)) if self.df > 0 else None


def interval(mean: float, error: float | None) -> Interval | None:
    """The 95 % interval of a mean with an error of ``TextErrors``."""
    return None if error is None else (mean - NORMAL * error, mean + NORMAL * error)
