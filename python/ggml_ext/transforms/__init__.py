"""Transforms of a block's sites: what is done to activations and weights before they are rounded. One module
per transform, each with solve(site, stats, request) -> SiteTransform; docs/flatquant.md has the
mathematics."""

from __future__ import annotations

from collections.abc import Callable

from ggml_ext.errors import GgmlExtError
from ggml_ext.sites import Site, SiteStats, SiteTransform
from ggml_ext.transforms import awq, flatquant, hadamard, none, smoothquant
from ggml_ext.transforms.activation import fake_quant_activation
from ggml_ext.transforms.request import TransformRequest
from ggml_ext.transforms.structure import split_budget
from ggml_ext.transforms.training import train

__all__ = [
    "FOLDED",
    "NAMES",
    "TransformRequest",
    "fake_quant_activation",
    "solve",
    "split_budget",
    "train",
]

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
    """The transform of one site, in closed form: no forward passes. Stored factors have F16 values, so that T
    and T^-T belong to each other exactly. Raises GgmlExtError for an unknown name or type and for statistics
    with NaN or Inf."""
    if request.name not in _SOLVERS:
        raise GgmlExtError(f"no transform {request.name}; there are: {', '.join(NAMES)}")
    return _SOLVERS[request.name](site, stats, request)
