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

from ggml_ext.methods.calibrate.block_file import FileSite
from ggml_ext.methods.sites import Site, SiteTransform


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
        if n > rows.shape[-2]:  # its matrices make the channels one after the other
            rows = rows.flatten(0, 1)
        mapped = rows[..., first : first + n, :] * gain[:, None]
        if transform.head is not None:
            mapped = _per_head(mapped, transform.head)
        new = rows.clone()
        new[..., first : first + n, :] = mapped
        tensors[name] = new.reshape(tensor.shape).float()
    for name in site.also:
        tensors[name] = (tensors[name].double() * transform.diag).float()
        changed.add(name)
    return changed


def file_sites(sites: Mapping[str, Site], transforms: Mapping[str, SiteTransform]) -> tuple[FileSite, ...]:
    """What the file says of a block's transforms (both by anchor): a line for each site that has one."""
    return tuple(
        _file_site(site, transforms[anchor])
        for anchor, site in sites.items()
        if not transforms[anchor].is_identity
    )


def _file_site(site: Site, transform: SiteTransform) -> FileSite:
    made = site.fold if site.fold is not None and site.fold.rows else None
    return FileSite(
        readers=(*(linear.tensor for linear in (*site.linears, *site.folded)), *site.also),
        online=len(site.linears) if site.online else 0,
        maker=made.tensor if made else "",
        first=made.first if made else 0,
        rows=made.n if made else 0,
        head=site.head_dim if made else 0,
        hadamard=transform.hadamard,
        clip=transform.clip,
        diagonal=() if bool((transform.diag == 1).all()) else _numbers(transform.diag),
        matrix=() if transform.head is None else _numbers(transform.head),
    )


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
