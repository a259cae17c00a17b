"""Transforms of a block's sites: what is done to activations and weights before they are rounded. One module
per transform, each with solve(site, stats, request) -> SiteTransform; docs/flatquant.md has the
mathematics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ggml_ext.errors import GgmlExtError
from ggml_ext.sites import Site, SiteStats, SiteTransform, identity
from ggml_ext.transforms import awq, flatquant, hadamard, none, smoothquant
from ggml_ext.transforms.activation import fake_quant_activation
from ggml_ext.transforms.request import TransformRequest
from ggml_ext.transforms.structure import split_budget

__all__ = [
    "FOLDED",
    "NAMES",
    "TransformRequest",
    "fake_quant_activation",
    "solve",
    "split_budget",
]

_SILENT = 1e-30  # mean square below which float32 arithmetic on the moments underflows

_SOLVERS: dict[str, Callable[[Site, SiteStats, TransformRequest], SiteTransform]] = {
    "none": none.solve,
    "smoothquant": smoothquant.solve,
    "awq": awq.solve,
    "hadamard": hadamard.solve,
    "flatquant": flatquant.solve,
}

NAMES = tuple(_SOLVERS)
FOLDED = frozenset({"none", "smoothquant", "awq"})  # nothing is left to do at run time besides a clip


def solve(site: Site, stats: SiteStats, request: TransformRequest) -> SiteTransform:
    """The transform of one site, in closed form: no forward passes. Stored factors have F16 values, so that
    T and T^-T belong to each other exactly. The identity for a site whose inputs were always 0 (a zeroed v
    or up, say): nothing can be learned about it, and nothing is lost. The identity too where the graph has
    no place for any part of a transform. Raises GgmlExtError for an unknown name or type and for statistics
    with NaN or Inf."""
    if not site.online:  # a clip is done online too
        request = replace(request, search_clip=False)
    if request.name not in _SOLVERS:
        raise GgmlExtError(f"no transform {request.name}; there are: {', '.join(NAMES)}")
    if not bool(torch.isfinite(stats.hessian).all() and torch.isfinite(stats.absmax).all()):
        raise GgmlExtError(f"{site.anchor}: its statistics hold NaN or Inf; check the model and the text")
    nowhere = not site.online and site.fold is None
    if nowhere or float(stats.hessian.diagonal().mean()) < _SILENT:
        return identity(site.n)
    return _SOLVERS[request.name](site, stats, request)
