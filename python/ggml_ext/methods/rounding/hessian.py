"""The second moments H of a matrix's inputs, as far as calibration's tokens tell them: shrunk towards their
diagonal before GPTQ believes in them.

Of n channels and m tokens the measured correlations hold noise of 1 / sqrt(m) each, and GPTQ moves errors
along all of them: with few tokens per channel more than it gains. (1 - s) H + s diag(H) keeps the variances,
for which few tokens suffice, and believes a part of the correlations. s = 1 is rounding by importance. How
s is chosen, and figures: docs/rounding.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.methods.rounding.grid import Floats

_DAMPING = 0.003  # of each channel's own diagonal
_DEAD = 1e-6  # of the mean diagonal, for channels that were never active
_SHRINKAGES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 1.0)
_FEW_TOKENS = 64  # of the sample: fewer do not decide anything
_OWN_TOKENS = 32  # after so many, an expert's variances count as much as those of all


@dataclass(frozen=True)
class Factors:
    """``u`` float32 [n, n]: upper triangular with (H + damping)^-1 = U^T U."""

    u: Floats

    def block(self, first: int, last: int) -> tuple[Floats, Floats]:
        """U of the columns first .. last - 1, and its inverse."""
        u = self.u[first:last, first:last]
        inverse = torch.linalg.solve_triangular(
            torch.from_numpy(u).double(), torch.eye(last - first, dtype=torch.float64), upper=True
        )
        return np.ascontiguousarray(u), inverse.float().numpy()


class Hessian:
    """``measured`` [n, n]: mean of x^T x over the inputs x. ``shrinkage``: s, from 0 (H is known exactly) to
    1. Everything derived is computed once, for all matrices that read the same inputs."""

    def __init__(self, measured: Tensor, shrinkage: float = 0.0) -> None:
        self.measured = measured
        self.shrinkage = shrinkage

    @property
    def finite(self) -> bool:
        """Whether there is neither NaN nor Inf."""
        return bool(torch.isfinite(self.measured).all())

    @cached_property
    def shrunk(self) -> Floats:
        """(1 - s) H + s diag(H), float32 [n, n]."""
        return shrink(self.measured, self.shrinkage).float().numpy()

    @cached_property
    def factors(self) -> Factors:
        """The Cholesky factor of the inverse of the shrunk and damped H.

        Raises GgmlExtError for an H that is no second moment.
        """
        h = _damped(shrink(self.measured.double(), self.shrinkage))
        try:
            factor = torch.linalg.cholesky(h)
            del h  # large: at most three such matrices at a time beside the caller's
            inverse = torch.cholesky_inverse(factor)
            del factor
            u = torch.linalg.cholesky(inverse, upper=True)
        except torch.linalg.LinAlgError as exc:  # type: ignore[attr-defined]
            raise GgmlExtError(
                "rounding gptq: the activations' second moments are not positive; use --rounding imatrix"
            ) from exc
        return Factors(np.ascontiguousarray(u.float().numpy()))


def shrink(h: Tensor, shrinkage: float) -> Tensor:
    """(1 - s) H + s diag(H), a new tensor [n, n]."""
    result = h * (1 - shrinkage)
    result.diagonal().copy_(h.diagonal())
    return result


def _damped(h: Tensor) -> Tensor:
    """H with more on its diagonal, in place; H = 0 becomes the identity.

    A share of each channel's own variance: a share of the mean would be the largest channels' doing.
    """
    diagonal = h.diagonal()
    mean = float(diagonal.mean())
    diagonal.mul_(1 + _DAMPING).add_(_DEAD * mean if mean > 0 else 1.0)
    return h


def default_shrinkage(tokens: int, n: int) -> float:
    """s where only the number of tokens is known: 1 / (1 + tokens / n)."""
    return 1 / (1 + tokens / n)


def choose_shrinkage(h: Tensor, tokens: int, sample: Tensor) -> float:
    """The s under which GPTQ does best on tokens that H has not seen.

    h [n, n]: mean of x^T x over ``tokens`` tokens. sample [m, n]: some or all of them, in the text's order.
    Takes the sample's tokens out of H and measures for several s what GPTQ would leave of rounding noise on
    them; where there are no others, each half of the sample is measured with the moments of the other.
    """
    n = len(h)
    if len(sample) < _FEW_TOKENS or not bool(torch.isfinite(h).all()) or not bool(h.diagonal().sum() > 0):
        return default_shrinkage(tokens, n)
    sample = sample.float()
    if len(sample) < tokens:
        trials = [((h * tokens - sample.T @ sample).float() / (tokens - len(sample)), sample)]
    else:
        halves = sample.tensor_split(2)
        trials = [(x.T @ x / len(x), unseen) for x, unseen in (halves, halves[::-1])]
    losses: dict[int, float] = {}

    def loss(index: int) -> float:
        if index not in losses:
            s = _SHRINKAGES[index]
            losses[index] = sum(noise_left(shrink(seen, s), unseen) for seen, unseen in trials)
        return losses[index]

    # The loss has one minimum: downhill from what the number of tokens suggests.
    guess = default_shrinkage(tokens, n)
    best = min(range(len(_SHRINKAGES)), key=lambda index: abs(_SHRINKAGES[index] - guess))
    for step in (1, -1):
        while 0 <= best + step < len(_SHRINKAGES) and loss(best + step) < loss(best):
            best += step
    return _SHRINKAGES[best]


def noise_left(h: Tensor, x: Tensor) -> float:
    """What GPTQ with the moments h [n, n] leaves of equal noise in all columns, on the inputs x [m, n],
    relative to rounding without it; infinite if h has no factor.

    Every row counts alike: by energy a few massive activations would decide for all tokens. With H = M D M^T,
    M unit upper triangular, the error of column j reaches the outputs as the j-th component of M^-1 x^T
    (docs/flatquant.md, "what GPTQ leaves").
    """
    lower, info = torch.linalg.cholesky_ex(_damped(h.clone()).flip(0, 1))
    if int(info):
        return float("inf")
    lower = lower.flip(0, 1)
    left = torch.linalg.solve_triangular(
        lower / lower.diagonal(), x.to(lower.dtype).T, upper=True, unitriangular=True
    )
    energy = x.square().sum(1).clamp_min(torch.finfo(x.dtype).tiny)
    return float((left.square().sum(0) / energy).mean())


def expert_moments(own: Tensor, tokens: int, shared: Tensor) -> Tensor:
    """An expert's second moments [n, n], shrunk towards those of all tokens of the layer.

    Correlations count by tokens against n of the shared ones, variances by tokens against few: the scale of
    an expert's inputs is its own, and known soon.
    """
    n = len(own)
    variance = (tokens * own.diagonal() + _OWN_TOKENS * shared.diagonal()) / (tokens + _OWN_TOKENS)
    share = tokens / (tokens + n)
    mixed = _correlations(own).mul_(share).add_(_correlations(shared), alpha=1 - share)
    mixed.diagonal().fill_(1)
    size = variance.clamp_min(0).sqrt()
    return mixed.mul_(size).mul_(size[:, None])


def expert_shrinkage(tokens: int, n: int, shared: float) -> float:
    """s for expert_moments: the shared one, and for the expert's own part what its tokens ask for."""
    return max(shared, default_shrinkage(tokens + n, n) * tokens / (tokens + n))


def _correlations(h: Tensor) -> Tensor:
    """h / sqrt(h_ii h_jj); 0 where a channel was never active."""
    size = h.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(size > 0, 1 / size, 0)
    return h * inverse * inverse[:, None]
