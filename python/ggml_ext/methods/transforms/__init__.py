"""Transforms of a block's sites: what is done to activations and weights before they are rounded. One module
per transform, each with solve(site, stats, request) -> SiteTransform; docs/flatquant.md has the
mathematics."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import torch

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.registry import TRANSFORMS
from ggml_ext.methods.sites import Site, SiteStats, SiteTransform, identity
from ggml_ext.methods.transforms.activation import fake_quant_activation
from ggml_ext.methods.transforms.request import TransformRequest
from ggml_ext.methods.transforms.structure import split_budget

__all__ = [
    "TransformRequest",
    "fake_quant_activation",
    "solve",
    "split_budget",
]

_SILENT = 1e-30  # mean square below which float32 arithmetic on the moments underflows


def solve(site: Site, stats: SiteStats, request: TransformRequest) -> SiteTransform:
    """The transform of one site, in closed form: no forward passes. Stored factors have F16 values, so that
    T and T^-T belong to each other exactly. The identity for a site whose inputs were always 0 (a zeroed v
    or up, say): nothing can be learned about it, and nothing is lost. The identity too where the graph has
    no place for any part of a transform. Raises GgmlExtError for an unknown name or type and for statistics
    with NaN or Inf."""
    if not site.online:  # a clip is done online too
        request = replace(request, search_clip=False)
    if request.name not in TRANSFORMS:
        raise GgmlExtError(f"no transform {request.name}; there are: {', '.join(TRANSFORMS)}")
    if not bool(torch.isfinite(stats.hessian).all() and torch.isfinite(stats.absmax).all()):
        raise GgmlExtError(f"{site.anchor}: its statistics hold NaN or Inf; check the model and the text")
    nowhere = not site.online and site.fold is None
    if nowhere or float(stats.hessian.diagonal().mean()) < _SILENT:
        return identity(site.n)
    solver = import_module(f"{__name__}.{request.name}").solve
    solved: SiteTransform = solver(site, stats, request)
    return solved
