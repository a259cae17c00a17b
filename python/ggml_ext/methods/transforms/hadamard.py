"""Hadamard rotations (QuaRot, arXiv 2404.00456): every transformed channel is a mix of all channels with
equal weights, so outliers spread out."""

from __future__ import annotations

import torch

from ggml_ext.methods.sites import Site, SiteStats, SiteTransform
from ggml_ext.methods.transforms.clip import with_best_clip
from ggml_ext.methods.transforms.diagonal import smooth
from ggml_ext.methods.transforms.matrices import hadamard_split, power_of_two, spreading
from ggml_ext.methods.transforms.request import TransformRequest
from ggml_ext.methods.transforms.structure import fits, folds_heads, implicit_over_heads, stored


def solve(site: Site, stats: SiteStats, request: TransformRequest) -> SiteTransform:
    """left (x) Walsh-Hadamard matrix of a power of two, left a Hadamard matrix or a DCT; after SmoothQuant's
    diagonal if the request gives an alpha."""
    diag = torch.ones(site.n, dtype=torch.float64)
    if request.alpha is not None:
        diag = smooth(site, stats, request.alpha)
    return with_best_clip(rotation(site, diag, request.budget_bits), site, stats, request)


def rotation(site: Site, diag: torch.Tensor, budget_bits: float | None = None) -> SiteTransform:
    """The rotation of the site after a diagonal. Stored factors that do not fit into the budget are left out.

    attn_out: a matrix over the heads (left) and one over head_dim (head, folded). Without room for left, one
    implicit matrix over both."""
    if not site.online:
        return SiteTransform(diag)
    if folds_heads(site):
        if fits(site, site.n_head**2, budget_bits):
            return SiteTransform(diag, head=spreading(site.head_dim), left=stored(spreading(site.n_head)))
        order = implicit_over_heads(site)
        return SiteTransform(diag, head=None if order else spreading(site.head_dim), hadamard=order)
    n1, n2 = hadamard_split(site.n)
    if n1 > 1 and not fits(site, n1 * n1, budget_bits):
        n1, n2 = 1, power_of_two(site.n)
    return SiteTransform(diag, left=stored(spreading(n1)) if n1 > 1 else None, hadamard=n2 if n2 > 1 else 0)
