"""Diagonals that can be folded, and SmoothQuant's choice of one."""

from __future__ import annotations

import torch
from torch import Tensor

from ggml_ext.methods.sites import Site, SiteStats


def shared_groups(site: Site) -> tuple[int, int, int] | None:
    """(n_head_kv, heads per value head, head_dim) for attn_out, whose channels are made of value heads that
    several query heads share; None where every channel is made on its own."""
    if not site.head_dim:
        return None
    return site.n_head_kv, site.n_head // site.n_head_kv, site.head_dim


def expand(site: Site, values: Tensor) -> Tensor:
    """One value per foldable channel -> one per channel [n]."""
    groups = shared_groups(site)
    if groups is None:
        return values
    return values.view(groups[0], 1, groups[2]).expand(*groups).reshape(site.n)


def reduce_max(site: Site, values: Tensor) -> Tensor:
    """One value per channel [n] -> the largest of those that share a foldable channel."""
    groups = shared_groups(site)
    return values if groups is None else values.view(groups).amax(1).reshape(-1)


def reduce_mean(site: Site, values: Tensor) -> Tensor:
    """One value per channel [n] -> the mean of those that share a foldable channel."""
    groups = shared_groups(site)
    return values if groups is None else values.view(groups).mean(1).reshape(-1)


def weight_absmax(site: Site) -> Tensor:
    """Largest |weight| of each column over all the site's matrices, [n] float64."""
    parts = [linear.weight.reshape(-1, site.n).abs().amax(0) for linear in site.linears]
    return torch.stack(parts).amax(0).double()


def smooth(site: Site, stats: SiteStats, alpha: float) -> Tensor:
    """SmoothQuant's diagonal (arXiv 2211.10438, eq. 4): max|x|^alpha / max|w|^(1 - alpha), [n] float64 with a
    geometric mean of 1; ones where nothing can be folded."""
    if site.fold is None:
        return torch.ones(site.n, dtype=torch.float64)
    x = reduce_max(site, _floored(stats.absmax.double().cpu()))
    w = reduce_max(site, _floored(weight_absmax(site).cpu()))
    return expand(site, centred(x**alpha / w ** (1 - alpha)))


def centred(values: Tensor) -> Tensor:
    """values / their geometric mean."""
    return values / values.log().mean().exp()


def _floored(values: Tensor) -> Tensor:
    """Channels that were never active, or that nobody reads, get a small value instead of 0."""
    return values.clamp_min(1e-5 * float(values.mean().clamp_min(torch.finfo(torch.float64).tiny)))
