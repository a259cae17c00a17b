"""The closed-form loss that flatquant minimises: the expected error of a site's outputs after rounding
weights and activations, relative to the outputs, from second moments and a sample alone. docs/flatquant.md
derives it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ggml_ext.core.registry import ROUNDINGS
from ggml_ext.methods.sites import Site, SiteStats
from ggml_ext.methods.transforms.activation import FLOAT_BITS, expected_error, grouped
from ggml_ext.methods.transforms.kronecker import Factors
from ggml_ext.methods.transforms.request import TransformRequest
from ggml_ext.runtime import native

SAMPLE_TOKENS = 4096
STEP_TOKENS = 1024  # drawn for a step: fewer than the sample, or the factors fit single tokens
SAMPLE_ROWS = 2048  # of all matrices of a site together
DAMPING = 0.01  # of the mean diagonal of H, as GPTQ has it
_EXACT_ORDER = 1024  # up to this n, H is factored in each step
_REFRESH_STEPS = 8  # beyond, in every eighth


@lru_cache(maxsize=64)
def weight_noise(type_name: str) -> tuple[float, int]:
    """(c, g): the type rounds a weight with a mean squared error of about c times the squared largest weight
    of its group of g. Measured on Gaussian rows; (0, 1) for float types."""
    if type_name.lower() in ("f32", "f16", "bf16"):
        return 0.0, 1
    block = native.block_size(type_name)
    rows = np.random.default_rng(0).standard_normal((32, max(block, 256))).astype(np.float32)
    importance = np.ones(rows.shape[1], np.float32)
    data = native.quantize(type_name, rows, importance, threads=1)
    error = float(np.square(native.dequantize(type_name, data, rows.shape[1]) - rows).mean())
    group = 16 if type_name.lower() in _GROUPS_OF_16 else min(block, 32)
    return error / float(np.square(rows.reshape(-1, group)).max(1).mean()), group


# Types whose finest scale covers 16 weights; the others' covers 32.
_GROUPS_OF_16 = ("fq4", "fq4_64", "fq3", "fq3_64", "q2_k", "q3_k", "q6_k", "nvfp4")


@dataclass(frozen=True)
class _Rows:
    """Rows of matrices whose types have groups of the same size. ``w`` float32 [rows, n]. What a row counts
    for, float32 [rows]: ``power`` its squared norm, ``noise`` the squared largest weights of its groups."""

    group: int
    w: Tensor
    power: Tensor
    noise: Tensor


class Loss:
    """The loss of one site as a function of its factors.

    Weights W [n_out, n] with T^-T, inputs with second moments H: a weight's rounding noise is c times the
    largest squared weight of its group, and what GPTQ leaves of noise in column j is D_j, the residual of
    channel j's transformed activation given the later channels (D of H' = M D M^T with M unit upper
    triangular); plain rounding leaves H'_jj. An activation's noise is its group's largest squared value /
    (12 levels^2), and reaches the output through |W'_j|^2. Every row counts relative to the matrix's output
    tr(W H W^T)."""

    def __init__(self, site: Site, stats: SiteStats, request: TransformRequest) -> None:
        generator = torch.Generator().manual_seed(request.seed)
        self.h = stats.hessian.float()
        self.sample = stats.sample[:: max(1, -(-len(stats.sample) // SAMPLE_TOKENS))].float()
        self.activation = request.activation
        self.residuals = ROUNDINGS[request.rounding].compensates
        self._generator = generator
        self._rows = _sampled_rows(site, self.h, request, generator)
        self._step = 0
        self._frozen: tuple[Tensor, Tensor] | None = None

    def value(self, factors: Factors, clip: float = 1.0) -> float:
        """The loss itself, over the whole sample."""
        with torch.no_grad():
            noise, power = self._weight_terms(factors)
            residual = self._residual(factors.moments(self.h))
            return float(residual @ noise + self._activation_term(factors, power, self.sample, clip))

    def surrogate(self, factors: Factors, clip: float | Tensor = 1.0) -> Tensor:
        """A scalar with the loss's gradient, over tokens drawn from the sample.

        D_j = v_j^T H' v_j for the v_j that minimises it, so its derivative by H' is v_j v_j^T: no
        differentiation through a factorisation. For n > 1024, V and the noise that weighs it are those of
        up to seven steps before.
        """
        noise, power = self._weight_terms(factors)
        moments = factors.moments(self.h)
        drawn = torch.randperm(len(self.sample), generator=self._generator)[:STEP_TOKENS]
        rest = self._activation_term(factors, power, self.sample[drawn], clip)
        if not self.residuals:
            return moments.diagonal() @ noise + rest
        if self._frozen is None or moments.shape[0] <= _EXACT_ORDER or self._step % _REFRESH_STEPS == 0:
            self._frozen = _residual_gradient(moments.detach(), noise.detach())
        self._step += 1
        gradient, residual = self._frozen
        return (gradient * moments).sum() + residual @ noise + rest

    def _weight_terms(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """The weights' noise per channel [n] and the squared columns [n] that carry the activations'
        noise."""
        noise = power = torch.zeros_like(self.h[0])
        for rows in self._rows:
            w = factors.weights(rows.w)
            power = power + rows.power @ w.square()
            if bool(rows.noise.any()):
                largest = grouped(w, rows.group).abs().amax(-1).square()
                per_group = rows.noise @ largest
                noise = noise + per_group.repeat_interleave(rows.group)[: len(noise)]
        return noise, power

    def _residual(self, moments: Tensor) -> Tensor:
        if not self.residuals:
            return moments.diagonal()
        return _factored(moments)[1]

    def _activation_term(
        self, factors: Factors, power: Tensor, sample: Tensor, clip: float | Tensor
    ) -> Tensor:
        if self.activation.bits >= FLOAT_BITS:
            return power.new_zeros(())
        return expected_error(factors.inputs(sample), self.activation, clip) @ power


def _sampled_rows(
    site: Site, h: Tensor, request: TransformRequest, generator: torch.Generator
) -> list[_Rows]:
    """Rows of the site's matrices, drawn evenly, by group size of their types."""
    total = sum(linear.weight.numel() for linear in site.linears) // site.n
    by_group: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for linear in site.linears:
        noise, group = weight_noise(request.type_of(linear))
        w = linear.weight.reshape(-1, site.n)
        count = len(w)
        if total > SAMPLE_ROWS:
            keep = max(1, SAMPLE_ROWS * count // total)
            w = w[torch.randperm(count, generator=generator)[:keep].sort().values.to(w.device)]
        output = ((w @ h) * w).sum().clamp_min(torch.finfo(torch.float32).tiny)
        scale = (1 / output).expand(len(w))  # of a row; the sampled rows' share in the output is their own
        by_group.setdefault(group, []).append((w, scale, scale * noise))
    return [
        _Rows(group, *(torch.cat(parts) for parts in zip(*rows, strict=True)))
        for group, rows in sorted(by_group.items())
    ]


def _factored(moments: Tensor) -> tuple[Tensor, Tensor]:
    """(M, D): moments + damping = M diag(D) M^T with M unit upper triangular."""
    damped = moments + DAMPING * moments.diagonal().mean() * torch.eye(len(moments), device=moments.device)
    lower = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    d = lower.diagonal()
    return lower / d, d.square()


def _residual_gradient(moments: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The derivative of sum_j noise_j D_j by the moments [n, n], and D [n]."""
    m, d = _factored(moments)
    eye = torch.eye(len(m), device=m.device)
    v = torch.linalg.solve_triangular(m, eye, upper=True, unitriangular=True)
    gradient = v.T @ (noise[:, None] * v)
    # The damping is a share of the mean diagonal, which moves with the moments.
    return gradient + DAMPING * gradient.diagonal().mean() * eye, d
