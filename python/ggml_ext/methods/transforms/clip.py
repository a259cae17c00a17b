"""The search for a site's activation clip."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ggml_ext.methods.sites import Site, SiteStats, SiteTransform
from ggml_ext.methods.transforms.activation import FLOAT_BITS, fake_quant_activation
from ggml_ext.methods.transforms.kronecker import Factors
from ggml_ext.methods.transforms.request import TransformRequest

_COARSE = tuple(step / 100 for step in range(40, 101, 6))
_FINE = (-0.04, -0.02, 0.02, 0.04)  # around the best of the coarse ones
_TOKENS = 1024


@torch.no_grad()
def with_best_clip(
    transform: SiteTransform, site: Site, stats: SiteStats, request: TransformRequest
) -> SiteTransform:
    """The transform with the clip that leaves the least error of the site's outputs on the sample: the mean
    of |(round(x') - x') W'^T|^2 / tr(W H W^T), summed over the matrices. As it is if no clip is searched."""
    if not request.clips or request.activation.bits >= FLOAT_BITS:
        return transform
    factors = Factors(site, transform)
    gram = factors.weights(factors.weights(_gram(site, stats.hessian.float())).T)
    moved = factors.inputs(stats.sample[:: max(1, -(-len(stats.sample) // _TOKENS))].float())

    def error(clip: float) -> float:
        difference = fake_quant_activation(moved, request.activation, clip) - moved
        return float(((difference @ gram) * difference).sum() / len(moved))

    errors = {clip: error(clip) for clip in _COARSE}
    best = min(errors, key=errors.__getitem__)
    errors |= {clip: error(clip) for clip in (round(best + step, 2) for step in _FINE) if clip <= 1}
    best = min(errors, key=errors.__getitem__)
    notes = {**transform.notes, "activation_error": errors[best], "activation_error_unclipped": errors[1.0]}
    return replace(transform, clip=best, notes=notes)


def _gram(site: Site, h: Tensor) -> Tensor:
    """sum over the site's matrices of W^T W / tr(W H W^T), [n, n] float32."""
    total = torch.zeros_like(h)
    for linear in site.linears:
        w = linear.weight.reshape(-1, site.n)
        gram = w.T @ w
        total += gram / (gram * h).sum().clamp_min(torch.finfo(h.dtype).tiny)
    return total
