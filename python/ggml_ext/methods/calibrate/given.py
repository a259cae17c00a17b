"""Transforms that were solved elsewhere: those of the official FlatQuant code, fitted to a model's blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.methods.calibrate.block_file import Packed
from ggml_ext.methods.model_sites import ModelSites
from ggml_ext.methods.sites import Site, SiteTransform, identity
from ggml_ext.methods.transforms.official import SITE_KINDS, SiteKind, load_official, load_official_kv
from ggml_ext.runtime import native
from ggml_ext.runtime.llama import Model

_READERS: Mapping[SiteKind, tuple[str, ...]] = {
    "attn_in": ("attn_q", "attn_qkv"),
    "attn_out": ("attn_output",),
    "ffn_in": ("ffn_up",),
    "ffn_mid": ("ffn_down",),
}
"""Matrices that tell the sites of the official code apart."""


@dataclass(frozen=True)
class Matrices:
    """``path``: the file. ``transforms``: of every block. ``cache``: P of k' = k P of each block, or None."""

    path: Path
    transforms: list[dict[SiteKind, SiteTransform]]
    cache: list[Tensor | None]


def load(path: Path) -> Matrices:
    """Reads the file. Raises GgmlExtError for one that is none (methods/transforms/official.py)."""
    return Matrices(path, load_official(path), load_official_kv(path))


def require_fit(matrices: Matrices, model: ModelSites) -> None:
    """Raises GgmlExtError unless the transforms are for the ``model``, whose weights are not read."""
    n_blocks = model.source.n_blocks
    if len(matrices.transforms) != n_blocks:
        raise GgmlExtError(
            f"{matrices.path}: transforms of {len(matrices.transforms)} blocks for a model of {n_blocks}; "
            "give this model's"
        )
    for index in range(n_blocks):
        sites(matrices, index, model.block(index, weights=False), clips=True)


def in_gguf_order(matrices: Matrices, model: Path) -> Matrices:
    """The same with ``cache`` for the heads of the GGUF ``model``.

    P of the file is for heads with Hugging Face's order of channels. In GGUF's order its rows move; its
    columns need not, since the queries get the inverse of the same matrix.
    """
    with Model(model, weights=False) as loaded:
        adjacent = loaded.adjacent_rope
    moved = [
        None if p is None else p[torch.from_numpy(head_order(len(p), adjacent=adjacent))]
        for p in matrices.cache
    ]
    return replace(matrices, cache=moved)


def sites(
    matrices: Matrices, index: int, block: Mapping[str, Site], *, clips: bool
) -> dict[str, SiteTransform]:
    """The transforms of the sites of block ``index``, by anchor; the identity for those that the official
    code does not know.

    clips: keep the clips of activations. They were learned for activations of few bits; at 8 bits they would
    only cut. Raises GgmlExtError for another model's.
    """
    found = matrices.transforms[index]
    placed = {kind: _site(index, block, names) for kind, names in _READERS.items()}
    where = f"{matrices.path}: block {index}"
    for kind in SITE_KINDS:
        site, n = placed[kind], found[kind].n
        if site is None or n != site.n:
            has = f"the model {site.n}" if site is not None else "the model has no such site"
            raise GgmlExtError(f"{where}: {kind} has {n} channels, {has}; give this model's transforms")
        if not _fits(site, found[kind]) or [*placed.values()].count(site) > 1:
            raise GgmlExtError(
                f"{where}: llama.cpp's graph has no place for the transform of {kind}; "
                "calibrate without --matrices"
            )
    kept = found if clips else {kind: replace(its, clip=1.0) for kind, its in found.items()}
    solved = {anchor: identity(site.n) for anchor, site in block.items()}
    return solved | {site.anchor: kept[kind] for kind, site in placed.items() if site is not None}


def _site(index: int, block: Mapping[str, Site], names: Sequence[str]) -> Site | None:
    """What one of the matrices reads."""
    wanted = {f"blk.{index}.{name}.weight" for name in names}
    return next(
        (site for site in block.values() if wanted & {linear.tensor for linear in site.linears}), None
    )


def _fits(site: Site, transform: SiteTransform) -> bool:
    """Whether the graph has a place for each part of the transform."""
    folds = not bool((transform.diag == 1).all()) or transform.head is not None
    return (site.online or not transform.online) and (site.fold is not None or not folds)


def cache_tensors(matrices: Matrices, index: int) -> dict[str, Packed]:
    """The transform of block ``index``'s K cache, in GGUF's order, and its inverse for the queries (fq_h in
    docs/gguf.md); empty if the file has none."""
    keys = matrices.cache[index]
    if keys is None:
        return {}
    pair = {"attn_k": keys, "attn_q": torch.linalg.inv(keys).T}
    return {f"blk.{index}.{name}.fq_h": _packed(matrix) for name, matrix in pair.items()}


def head_order(dim: int, *, adjacent: bool) -> NDArray[np.int64]:
    """Channel j of a head in GGUF is channel result[j] of the head in Hugging Face's q and k.

    adjacent: whether llama.cpp's RoPE turns adjacent channels, Hugging Face's channels half a head apart.

    Where it does, llama.cpp's converter moves the rows of each head from (half, pair) to
    (pair, half): LlamaModel.permute in conversion/llama.py.
    """
    order = np.arange(dim, dtype=np.int64)
    return order.reshape(2, dim // 2).T.reshape(-1) if adjacent else order


def _packed(matrix: Tensor) -> Packed:
    rows = np.ascontiguousarray(matrix.float().numpy())
    return Packed("f32", (rows.shape[1], rows.shape[0]), native.quantize("f32", rows))
