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
from ggml_ext.sites import SITE_KINDS, Site, SiteKind, SiteTransform


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
        rows = tensor[..., first : first + n, :] if matrix else tensor[first : first + n, None]
        mapped = rows * gain[:, None]
        if transform.head is not None:
            mapped = _per_head(mapped, transform.head)
        new = tensor.clone()
        if matrix:
            new[..., first : first + n, :] = mapped
        else:
            new[first : first + n] = mapped[:, 0]
        tensors[name] = new.float()
    for name in site.also:
        tensors[name] = (tensors[name].double() * transform.diag).float()
        changed.add(name)
    return changed


def folded(transforms: Mapping[SiteKind, SiteTransform]) -> Folded:
    """The record of what ``fold`` does with a block's transforms, one for each of SITE_KINDS."""

    def numbers(part: Tensor) -> tuple[float, ...]:
        return tuple(part.detach().float().flatten().tolist())

    diagonals = tuple(
        () if bool((transforms[kind].diag == 1).all()) else numbers(transforms[kind].diag)
        for kind in SITE_KINDS
    )
    head = transforms["attn_out"].head
    return Folded(diagonals, () if head is None else numbers(head))


def unfold(site: Site, transform: SiteTransform, weight: Tensor) -> Tensor:
    """A matrix whose output rows ``fold`` changed, [.., n_out, n_in], as it was before; differentiable.

    The site's fold is that matrix.
    """
    assert site.fold is not None
    first, n = site.fold.first, site.fold.n
    rows = weight[..., first : first + n, :].double()
    if transform.head is not None:
        rows = _per_head(rows, torch.linalg.inv(transform.head))
    rows = (rows * _per_channel(site, transform.diag)[:, None]).to(weight.dtype)
    return torch.cat([weight[..., :first, :], rows, weight[..., first + n :, :]], -2)


def _per_channel(site: Site, diag: Tensor) -> Tensor:
    """diag over the channels that are made; in attn_out a value head's feed several query heads."""
    if site.kind != "attn_out":
        return diag
    shared = diag.view(site.n_head_kv, -1, site.head_dim)
    if not bool((shared == shared[:, :1]).all()):
        raise ValueError(f"{site.anchor}: a diagonal that differs between the query heads of a value head")
    return shared[:, 0].reshape(-1)


def _per_head(rows: Tensor, head: Tensor) -> Tensor:
    """The rows of v [.., heads * head_dim, n_in] when every head's v becomes v @ head."""
    blocks = rows.reshape(*rows.shape[:-2], -1, head.shape[0], rows.shape[-1])
    return torch.einsum("ij,...hin->...hjn", head, blocks).flatten(-3, -2)
