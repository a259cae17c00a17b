"""Transforms that were solved elsewhere: those of the official FlatQuant code, fitted to a model's blocks."""

from __future__ import annotations

from dataclasses import replace
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


def sites(matrices: Path, block: Block, n_blocks: int, *, clips: bool) -> dict[SiteKind, SiteTransform]:
    """The transforms of the block's sites.

    clips: keep the clips of activations. They were learned for activations of few bits; at 8 bits they would
    only cut. Raises GgmlExtError for a file that is none (transforms/official.py), or another model's.
    """
    saved = load_official(matrices)
    if len(saved) != n_blocks:
        raise GgmlExtError(
            f"{matrices}: transforms of {len(saved)} blocks for a model of {n_blocks}; give this model's"
        )
    found = saved[block.index]
    for kind, site in block.sites.items():
        if found[kind].n != site.n:
            raise GgmlExtError(
                f"{matrices}: block {block.index}: {kind} has {found[kind].n} channels, the model {site.n}; "
                "give this model's transforms"
            )
    return found if clips else {kind: replace(its, clip=1.0) for kind, its in found.items()}


def cache_tensors(matrices: Path, block: Block) -> dict[str, Packed]:
    """The transform of the K cache and its inverse for the queries (fq_h in docs/gguf.md); empty if the file
    has none.

    P of the file is for heads with Hugging Face's order of channels. In GGUF's order its rows move; its
    columns need not, since the queries get the inverse of the same matrix. Raises GgmlExtError for another
    head size.
    """
    p = load_official_kv(matrices)[block.index]
    if p is None:
        return {}
    order = block.head_order()
    if len(p) != len(order):
        raise GgmlExtError(
            f"{matrices}: block {block.index}: its K cache has heads of {len(p)}, the model's have "
            f"{len(order)} channels; give this model's transforms"
        )
    keys = p[torch.from_numpy(order)]
    pair = {"attn_k": keys, "attn_q": torch.linalg.inv(keys).T}
    return {f"blk.{block.index}.{name}.fq_h": _packed(matrix) for name, matrix in pair.items()}


def _packed(matrix: Tensor) -> Packed:
    rows = np.ascontiguousarray(matrix.float().numpy())
    return Packed("f32", (rows.shape[1], rows.shape[0]), native.quantize("f32", rows))
