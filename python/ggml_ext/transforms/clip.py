"""The search for a site's activation clip."""

from __future__ import annotations

from dataclasses import replace

import torch

from ggml_ext.sites import Site, SiteStats, SiteTransform
from ggml_ext.transforms.activation import FLOAT_BITS, fake_quant_activation
from ggml_ext.transforms.request import TransformRequest

_CLIPS = tuple(step / 50 for step in range(20, 51))  # 0.40 .. 1.00
_TOKENS = 1024


@torch.no_grad()
def with_best_clip(
    transform: SiteTransform, site: Site, stats: SiteStats, request: TransformRequest
) -> SiteTransform:
    """The transform with the clip that leaves the least error of the site's outputs on the sample: the mean
    of |(round(x') - x') W'^T|^2 / tr(W H W^T), summed over the matrices. As it is if no clip is searched."""
    if not request.clips or request.activation.bits >= FLOAT_BITS:
        return transform
    x = _spread(stats.sample, _TOKENS).cpu().float()
    gram = transform.dual().hessian(gram_of_weights(site, stats).cpu()).float()
    moved = transform.apply(x.double()).float()

    def error(clip: float) -> float:
        difference = fake_quant_activation(moved, request.activation, clip) - moved
        return float(((difference @ gram) * difference).sum() / len(x))

    errors = {clip: error(clip) for clip in _CLIPS}
    best = min(errors, key=errors.__getitem__)
    notes = {**transform.notes, "activation_error": errors[best], "activation_error_unclipped": errors[1.0]}
    return replace(transform, clip=best, notes=notes)


def gram_of_weights(site: Site, stats: SiteStats) -> torch.Tensor:
    """sum over the site's matrices of W^T W / tr(W H W^T), [n, n] float64."""
    h = stats.hessian.double()
    total = torch.zeros_like(h)
    for linear in site.linears:
        w = linear.weight.reshape(-1, site.n)
        gram = (w.T @ w).double()
        total += gram / (gram * h).sum().clamp_min(torch.finfo(h.dtype).tiny)
    return total


def _spread(rows: torch.Tensor, most: int) -> torch.Tensor:
    """At most so many rows, evenly spaced."""
    return rows[:: max(1, -(-len(rows) // most))]
