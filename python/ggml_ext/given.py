"""Transforms that were solved elsewhere: those of the official FlatQuant code, fitted to a model's blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ggml_ext import native
from ggml_ext.block_file import Packed
from ggml_ext.blocks import Block
from ggml_ext.errors import GgmlExtError
from ggml_ext.sites import SiteKind, SiteTransform
from ggml_ext.transforms.official import load_official, load_official_kv


@dataclass(frozen=True)
class Matrices:
    """``path``: the file. ``transforms``: of every block. ``cache``: P of k' = k P of each block, or None."""

    path: Path
    transforms: list[dict[SiteKind, SiteTransform]]
    cache: list[Tensor | None]


def load(path: Path, n_blocks: int) -> Matrices:
    """Reads the file for a model of ``n_blocks``. Raises GgmlExtError for a file that is none
    (transforms/official.py), or another model's."""
    transforms = load_official(path)
    if len(transforms) != n_blocks:
        raise GgmlExtError(
            f"{path}: transforms of {len(transforms)} blocks for a model of {n_blocks}; give this model's"
        )
    return Matrices(path, transforms, load_official_kv(path))


def sites(matrices: Matrices, block: Block, *, clips: bool) -> dict[SiteKind, SiteTransform]:
    """The transforms of the block's sites.

    clips: keep the clips of activations. They were learned for activations of few bits; at 8 bits they would
    only cut. Raises GgmlExtError for another model's.
    """
    found = matrices.transforms[block.index]
    for kind, site in block.sites.items():
        if found[kind].n != site.n:
            raise GgmlExtError(
                f"{matrices.path}: block {block.index}: {kind} has {found[kind].n} channels, the model "
                f"{site.n}; give this model's transforms"
            )
    return found if clips else {kind: replace(its, clip=1.0) for kind, its in found.items()}


def cache_tensors(matrices: Matrices, block: Block) -> dict[str, Packed]:
    """The transform of the K cache and its inverse for the queries (fq_h in docs/gguf.md); empty if the file
    has none.

    P of the file is for heads with Hugging Face's order of channels. In GGUF's order its rows move; its
    columns need not, since the queries get the inverse of the same matrix. Raises GgmlExtError for another
    head size.
    """
    p = matrices.cache[block.index]
    if p is None:
        return {}
    order = block.head_order()
    if len(p) != len(order):
        raise GgmlExtError(
            f"{matrices.path}: block {block.index}: its K cache has heads of {len(p)}, the model's have "
            f"{len(order)} channels; give this model's transforms"
        )
    keys = p[torch.from_numpy(order)]
    pair = {"attn_k": keys, "attn_q": torch.linalg.inv(keys).T}
    return {f"blk.{block.index}.{name}.fq_h": _packed(matrix) for name, matrix in pair.items()}


def _packed(matrix: Tensor) -> Packed:
    rows = np.ascontiguousarray(matrix.float().numpy())
    return Packed("f32", (rows.shape[1], rows.shape[0]), native.quantize("f32", rows))
