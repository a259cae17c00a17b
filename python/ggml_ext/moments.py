"""Accumulates what calibration sees at a site: second moments, largest values, a sample of tokens.

Sums are float32: matrix products per batch are added in place, so that no second matrix of n x n is ever
held. Their relative error after b batches is about 6e-8 sqrt(b), far below what rounding methods damp. Only
panels of rows from the diagonal to the right are summed, half the arithmetic; the rest mirrors them."""

from __future__ import annotations

import torch
from torch import Tensor

from ggml_ext.sites import SiteStats

MAX_EXPERT_BYTES = 2**31
"""Second moments per expert are left out where all experts of a site would take more."""

LARGEST_TOKEN = 64.0
"""A token counts at most as much as so many median ones (``tempered``); docs/rounding.md has the figures."""

PANEL = 1024
"""Rows of a second moment that one matrix product computes."""


def add_product(moment: Tensor, x: Tensor) -> None:
    """Adds x^T x to ``moment`` [n, n], except below the panels; x float32 [tokens, n]."""
    for i in range(0, x.shape[1], PANEL):
        moment[i : i + PANEL, i:].addmm_(x[:, i : i + PANEL].T, x[:, i:])


def mirror(moment: Tensor) -> None:
    """Makes a sum of add_product whole: what is below the panels is copied from above the diagonal."""
    for i in range(PANEL, moment.shape[0], PANEL):
        moment[i : i + PANEL, :i] = moment[:i, i : i + PANEL].T


def tempered(x: Tensor) -> Tensor:
    """Tokens [tokens, n] of which the largest are scaled down, to LARGEST_TOKEN times the median |x|^2.

    A window's first token, and few others, can carry activations thousands of times as large as the rest
    (massive activations, arXiv 2402.17762); unscaled they would be all that the moments show, and what is
    measured later are the other tokens.
    """
    power = x.square().sum(-1)
    limit = LARGEST_TOKEN * power.median() if len(x) else power.new_zeros(())
    large = (power > limit) & (limit > 0)
    return torch.where(large[:, None], x * (limit / power).sqrt()[:, None], x) if bool(large.any()) else x


class Sample:
    """Every s-th token, s the smallest power of two that keeps ``limit`` tokens or fewer. No random numbers,
    and the number of tokens need not be known before."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._stride = 1
        self._seen = 0
        self._kept: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """x float32 [tokens, n]."""
        self._kept.append(x[-self._seen % self._stride :: self._stride].clone())
        self._seen += len(x)
        while sum(map(len, self._kept)) > self._limit:
            self._kept = [torch.cat(self._kept)[::2].clone()]
            self._stride *= 2

    def tokens(self) -> Tensor:
        """float32 [m, n]: tokens 0, s, 2 s, ..."""
        return torch.cat(self._kept)


class Moments:
    """The statistics of one site of ``n`` channels, and per expert if ``experts`` is not 0."""

    def __init__(self, n: int, sample_tokens: int, device: torch.device, experts: int = 0) -> None:
        self._hessian = torch.zeros(n, n, device=device)
        self._absmax = torch.zeros(n, device=device)
        self._sample = Sample(sample_tokens)
        self._n_tokens = 0
        self._expert_tokens = torch.zeros(experts, dtype=torch.int64) if experts else None
        self._expert_hessian = None
        if experts and experts * n * n * 4 <= MAX_EXPERT_BYTES:
            self._expert_hessian = torch.zeros(experts, n, n, device=device)

    def add(self, x: Tensor) -> None:
        """Tokens [..., n] that the site's matrices read."""
        x = tempered(x.reshape(-1, x.shape[-1]).float())
        add_product(self._hessian, x)
        self._absmax = torch.maximum(self._absmax, torch.maximum(x.amax(0), -x.amin(0)))
        self._sample.add(x)
        self._n_tokens += len(x)

    def add_routed(self, x: Tensor, expert: int) -> None:
        """The tokens [tokens, n] among those added that one expert reads."""
        assert self._expert_tokens is not None
        self._expert_tokens[expert] += len(x)
        if self._expert_hessian is not None:
            add_product(self._expert_hessian[expert], tempered(x.float()))

    def finish(self) -> SiteStats:
        """The means; the object is used up. An expert that no token reached has a second moment of 0."""
        for moment in (self._hessian, *(self._expert_hessian if self._expert_hessian is not None else ())):
            mirror(moment)
        if self._expert_hessian is not None and self._expert_tokens is not None:
            counts = self._expert_tokens.clamp(min=1).to(self._expert_hessian)
            self._expert_hessian /= counts[:, None, None]
        return SiteStats(
            hessian=self._hessian.div_(max(self._n_tokens, 1)),
            absmax=self._absmax,
            sample=self._sample.tokens(),
            n_tokens=self._n_tokens,
            expert_hessian=self._expert_hessian,
            expert_tokens=self._expert_tokens,
        )
