"""The proof that a conversion's structure is exact, made before anything is solved.

All that a transform does (what is folded, the matrix over a head's channels, the online factors) is drawn at
random as diagonals of signed powers of two, and goes the way that the solved ones will go: through the folds,
into a file, and from there into llama.cpp's graph. In exact types such a file gives the logits of the float
model bit for bit: no product changes but for its exponent. A reader that was missed, a norm that something
else reads too, or a clamp between v and its matrix gives others. Matrices of blocks of other types are
compared as bf16, in both files: f16 has too few exponents for scaled activations and weights, and with q8_0
llama.cpp would round what they read by blocks of channels.

A diagonal does not tell whether a full matrix over a head's channels can be folded, so a second file permutes
them. Sums then run in another order, and most tokens keep their logits but for rounding; not all, since in a
mixture a near tie may choose another expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.progress import track
from ggml_ext.core.registry import TRANSFORMS, Transform
from ggml_ext.methods.calibrate.block import Job, encode_block
from ggml_ext.methods.calibrate.block_file import FileSite, Stored, block_path, load, save
from ggml_ext.methods.model_sites import ModelSites
from ggml_ext.methods.sites import Site, SiteTransform, identity
from ggml_ext.methods.transforms.diagonal import expand
from ggml_ext.methods.transforms.structure import folds_heads
from ggml_ext.runtime.llama import Model
from ggml_ext.types.encode import Prepared, write
from ggml_ext.types.rules import Choice

TOKENS = 64

EXACT = ("f32", "bf16")
"""Types of weights whose products are the same but for their exponent when a channel is scaled."""

REORDERED: Mapping[str, float] = {"f32": 1e-3, "bf16": 1e-2}
"""Largest difference of a logit, relative to the largest, for the median token where sums run in another
order. Products of bf16 round their inputs to eight bits: what differs in the last bit of a float can round to
the other side there."""

Draw = Callable[[Site, np.random.Generator], SiteTransform]


def prove(model: ModelSites, work: Path, transform: str, *, threads: int = 0) -> None:
    """Makes the files in the folder ``work`` and compares. transform: one of registry.TRANSFORMS, whose parts
    are drawn.

    Raises GgmlExtError if the logits differ.
    """
    types = {tensor.type_name for tensor in model.source.tensors}
    if types <= set(EXACT):
        base = logits(model.source.path, threads)
    else:
        base = _with(model, work, lambda site, _: identity(site.n), transform, threads)
    found = _with(model, work, partial(powers, parts=TRANSFORMS[transform]), transform, threads)
    _require(model, float(_differences(found, base).max()), 0.0)
    if TRANSFORMS[transform].heads:
        found = _with(model, work, permuted, transform, threads)
        reordered = REORDERED["f32" if types == {"f32"} else "bf16"]
        _require(model, float(np.median(_differences(found, base))), reordered)


def _differences(found: NDArray[np.float32], base: NDArray[np.float32]) -> NDArray[np.float32]:
    """Per token the largest difference, relative to the largest logit."""
    differences: NDArray[np.float32] = np.abs(found - base).max(axis=1) / np.abs(base).max()
    return differences


def _require(model: ModelSites, difference: float, allowed: float) -> None:
    if not difference <= allowed:
        raise GgmlExtError(
            f"{model.source.path}: a transform that should change nothing changes the logits by "
            f"{difference:.2g} of the largest; please report it with the model, and use --transform none"
        )


def logits(path: Path, threads: int = 0) -> NDArray[np.float32]:
    """Logits [TOKENS, n_vocab] of tokens drawn at random, always the same ones."""
    with Model(path, threads=threads or None) as model:
        model.start(n_ctx=TOKENS, n_seq=1, n_batch=TOKENS, exact=True)
        tokens = np.random.default_rng(0).integers(model.n_vocab, size=TOKENS).astype(np.int32)
        positions = np.arange(TOKENS, dtype=np.int32)
        return model.decode(tokens, positions, np.zeros_like(positions), np.ones(TOKENS, bool)).copy()


def powers(site: Site, random: np.random.Generator, *, parts: Transform) -> SiteTransform:
    """Diagonals of signed powers of two in all ``parts`` that the site has a place for."""

    def drawn(n: int, largest: int) -> Tensor:
        return torch.from_numpy(
            random.choice([-1.0, 1.0], n) * np.exp2(random.integers(-largest, largest + 1, n))
        )

    diag = torch.ones(site.n, dtype=torch.float64)
    head = left = right = None
    if site.fold is not None:
        diag = expand(site, drawn(site.n_head_kv * site.head_dim if site.head_dim else site.n, 2))
        if parts.heads and folds_heads(site):
            head = torch.diag(drawn(site.head_dim, 1))
    if parts.online and site.online:
        n1 = next(d for d in range(math.isqrt(site.n), 0, -1) if site.n % d == 0)
        left, right = torch.diag(drawn(n1, 1)), torch.diag(drawn(site.n // n1, 1))
    return SiteTransform(diag, head=head, left=left, right=right)


def permuted(site: Site, random: np.random.Generator) -> SiteTransform:
    """A permutation of each head's channels, where a matrix over them can be folded."""
    if not folds_heads(site):
        return identity(site.n)
    order = torch.from_numpy(random.permutation(site.head_dim))
    return replace(identity(site.n), head=torch.eye(site.head_dim, dtype=torch.float64)[order])


def _with(model: ModelSites, work: Path, draw: Draw, transform: str, threads: int) -> NDArray[np.float32]:
    """The logits of such a file."""
    return logits(written(model, work, draw, transform, threads), threads)


def written(model: ModelSites, work: Path, draw: Draw, transform: str, threads: int) -> Path:
    """Makes a file, in ``work``, with the transforms that ``draw`` gives, and returns its path."""
    source, random = model.source, np.random.default_rng(0)
    types = {tensor.name: tensor.type_name for tensor in source.tensors}
    proven = {name: its if its in EXACT else "bf16" for name, its in types.items()}
    job = Job(proven, "rtn", model.read, threads=threads)
    tensors: dict[str, Stored] = {}
    placed: list[FileSite] = []
    with track(source.n_blocks, "proof", "blocks") as advance:
        for index in range(source.n_blocks):
            sites = model.block(index)
            transforms = {anchor: draw(site, random) for anchor, site in sites.items()}
            packed, findings = encode_block(sites, None, transforms, job)
            save(block_path(work, index), packed, findings)
            tensors |= load(block_path(work, index))[0]
            placed += findings.sites
            advance(1)
    prepared = Prepared(
        tensors=tensors,
        mix="",
        transform=transform,
        rounding="rtn",
        sites=placed,
        activation=None,
        errors={},
        losses={},
    )
    out = work / "proof.gguf"
    choices = [
        Choice(name, tensors[name].type_name if name in tensors else its, "") for name, its in types.items()
    ]
    write(source, out, choices, None, None, prepared=prepared, threads=threads)
    return out
