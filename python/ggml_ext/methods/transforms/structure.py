"""Which Kronecker factors a site gets: the largest structure whose stored factors fit into a budget."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ggml_ext.methods.sites import Site
from ggml_ext.methods.transforms.matrices import power_of_two

_FACTOR_BITS = 16  # factors are stored as F16


@dataclass(frozen=True)
class Structure:
    """``left``, ``right``: orders of the stored factors, 0 for none. ``hadamard``: order of the implicit
    Walsh-Hadamard matrix in right's place, 0 for none."""

    left: int = 0
    right: int = 0
    hadamard: int = 0

    @property
    def values(self) -> int:
        return self.left**2 + self.right**2


def n_weights(site: Site) -> int:
    return sum(linear.weight.numel() for linear in site.linears)


def fits(site: Site, values: int, budget_bits: float | None) -> bool:
    """Whether so many F16 values stay within budget_bits per weight of the site's matrices."""
    return budget_bits is None or values * _FACTOR_BITS <= budget_bits * n_weights(site)


def folds_heads(site: Site) -> bool:
    """Whether the head_dim part of the site's transform can be folded into v."""
    return site.head_dim > 0 and site.fold is not None and site.mixes_heads


def implicit_over_heads(site: Site) -> int:
    """Order of a Walsh-Hadamard matrix over whole heads that needs no storage, 0 if there is none."""
    heads = power_of_two(site.n_head)
    if heads == 1 or power_of_two(site.head_dim) != site.head_dim:
        return 0
    return heads * site.head_dim


def structures(site: Site) -> list[Structure]:
    """What flatquant can use at the site, in the order of storage. The last is the whole left (x) right with
    left and right as square as n allows; the others are a left factor times an implicit Hadamard matrix."""
    if not site.online:
        return [Structure()]
    if folds_heads(site):
        return [Structure(hadamard=implicit_over_heads(site)), Structure(left=site.n_head)]
    n1 = next(d for d in range(math.isqrt(site.n), 0, -1) if site.n % d == 0)
    full = Structure(left=n1 if n1 > 1 else 0, right=site.n // n1)
    found = [Structure(hadamard=power_of_two(site.n) if site.n % 2 == 0 else 0)]
    order = power_of_two(site.n) // (2 if power_of_two(site.n) == site.n else 1)
    while order > 1:
        part = Structure(left=site.n // order, hadamard=order)
        if part.values < full.values:
            found.append(part)
        order //= 2
    return [*found, full]


def largest(site: Site, budget_bits: float | None) -> Structure:
    """The last of the structures that fits; the first needs no storage."""
    return [s for s in structures(site) if fits(site, s.values, budget_bits)][-1]


def split_budget(sites: Mapping[str, Site], budget_bits: float | None) -> dict[str, float | None]:
    """How a block's budget for stored factors, in bits per weight of its matrices, is shared among its sites:
    for each site (by any key), bits per weight of the site's own matrices.

    Of all combinations of structures that fit, takes the one with the largest sum of weights x log2(order of
    the learned factors): what a site's matrices gain grows with the order, ever more slowly.
    """
    if budget_bits is None:
        return dict.fromkeys(sites)
    weights = {key: n_weights(site) for key, site in sites.items()}
    allowed = budget_bits * sum(weights.values())
    best: tuple[float, int, tuple[Structure, ...]] | None = None
    for choice in itertools.product(*(structures(site) for site in sites.values())):
        values = sum(structure.values for structure in choice)
        if values * _FACTOR_BITS > allowed:
            continue
        gain = sum(
            weights[key] * math.log2(max(s.left, 1) * max(s.right, 1))
            for key, s in zip(sites, choice, strict=True)
        )
        if best is None or (gain, -values) > best[:2]:
            best = (gain, -values, choice)
    assert best is not None  # the structures without storage always fit
    return {
        key: structure.values * _FACTOR_BITS / weights[key]
        for key, structure in zip(sites, best[2], strict=True)
    }


def stored(matrix: Tensor) -> Tensor:
    """The matrix as the file holds it: F16 values, in float64, so that T and T^-T belong to each other."""
    return matrix.to(torch.float16).to(torch.float64)
