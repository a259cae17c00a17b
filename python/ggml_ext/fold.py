"""The offline part of transforms: what becomes of norms, of the rows before a site, and of routers.

A site's T = diag(1 / diag) (I (x) head) (left (x) right), see sites.py. Its first two factors act on the
site's channels, so they go into whatever makes these channels: a norm's gain, or the output rows of a matrix
(v, up) and its bias. Every matrix that reads the channels takes the inverse: those that also read the online
part get all of T^-T (SiteTransform.weight), a router only that of the folded part.

Tensors are in GGUF's order throughout, [n], [n_out, n_in] or [experts, n_out, n_in], float32.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor

from ggml_ext.block_file import Folded
from ggml_ext.sites import SITE_KINDS, Site, SiteTransform


def fold(site: Site, transform: SiteTransform, tensors: MutableMapping[str, Tensor]) -> set[str]:
    """Puts the offline part of the site's transform into ``tensors`` and returns the names that it changed.

    tensors must hold what Site.fold and Site.also name. Raises ValueError for an offline part where nothing
    can take it, and for one that differs between query heads that share a value head.
    """
    folded = not bool((transform.diag == 1).all()) or transform.head is not None
    if not folded:
        return set()
    if site.fold is None:
        raise ValueError(f"{site.anchor}: an offline part, and nothing before the site to take it")
    gain = 1 / _per_channel(site, transform.diag)
    changed = {site.fold.tensor}
    first, n = (site.fold.first, site.fold.n) if site.fold.rows else (0, site.n)
    places = [(site.fold.tensor, site.fold.rows)]
    if site.fold.bias:
        places.append((site.fold.bias, False))
        changed.add(site.fold.bias)
    for name, matrix in places:
        tensor = tensors[name].double()
        rows = tensor if matrix else tensor[..., None]
        mapped = rows[..., first : first + n, :] * gain[:, None]
        if transform.head is not None:
            mapped = _per_head(mapped, transform.head)
        new = rows.clone()
        new[..., first : first + n, :] = mapped
        tensors[name] = (new if matrix else new[..., 0]).float()
    for name in site.also:
        tensors[name] = (tensors[name].double() * transform.diag).float()
        changed.add(name)
    return changed


def folded(sites: Mapping[str, Site], transforms: Mapping[str, SiteTransform]) -> Folded:
    """The record of what ``fold`` does with a block's transforms (both by anchor)."""
    diagonals: list[tuple[float, ...]] = [()] * len(SITE_KINDS)
    head: tuple[float, ...] = ()
    for anchor, site in sites.items():
        if not site.kind:
            continue
        transform = transforms[anchor]
        if not bool((transform.diag == 1).all()):
            diagonals[SITE_KINDS.index(site.kind)] = _numbers(transform.diag)
        if transform.head is not None:
            head = _numbers(transform.head)
    return Folded(tuple(diagonals), head)


def _numbers(part: Tensor) -> tuple[float, ...]:
    return tuple(part.detach().float().flatten().tolist())


def _per_channel(site: Site, diag: Tensor) -> Tensor:
    """diag over the channels that are made; in attn_out a value head's feed several query heads."""
    if not site.head_dim:
        return diag
    shared = diag.view(site.n_head_kv, -1, site.head_dim)
    if not bool((shared == shared[:, :1]).all()):
        raise ValueError(f"{site.anchor}: a diagonal that differs between the query heads of a value head")
    return shared[:, 0].reshape(-1)


def _per_head(rows: Tensor, head: Tensor) -> Tensor:
    """The rows of v [.., heads * head_dim, n_in] when every head's v becomes v @ head."""
    blocks = rows.reshape(*rows.shape[:-2], -1, head.shape[0], rows.shape[-1])
    return torch.einsum("ij,...hin->...hjn", head, blocks).flatten(-3, -2)
