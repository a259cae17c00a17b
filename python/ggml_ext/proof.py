"""The proof that a conversion's structure is exact, made before anything is solved.

All that a transform does (what is folded, the matrix over a head's channels, the online factors) is drawn
at random as diagonals of signed powers of two, and goes the way that the solved ones will go: through the
folds, into a file, and from there into llama.cpp's graph. In exact types such a file gives the logits of
the float model bit for bit: no product changes but for its exponent. A reader that was missed, a norm that
something else reads too, or a clamp between v and its matrix gives others. """

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ggml_ext.block_file import Folded, Stored, block_path, load, save
from ggml_ext.blockwise import Job, encode_block
from ggml_ext.encode import Prepared, write
from ggml_ext.errors import GgmlExtError
from ggml_ext.llama import Model
from ggml_ext.model_sites import ModelSites
from ggml_ext.progress import track
from ggml_ext.rules import Choice
from ggml_ext.sites import Site, SiteTransform
from ggml_ext.transforms.diagonal import expand

TOKENS = 64

TOLERANCES: Mapping[str, float] = {"f32": 0.0, "bf16": 0.0, "f16": 1e-4}
"""Largest difference of a logit, relative to the largest logit, by the type of the weights. Products of f16
round their inputs to f16, whose smallest numbers have fewer digits."""


def prove(model: ModelSites, work: Path, *, online: bool, threads: int = 0) -> None:
    """Makes the file in the folder ``work`` and compares. online: whether the transform has an online part.

    Raises GgmlExtError if the logits differ.
    """
    made = _write(model, work, online=online, threads=threads)
    base = logits(model.source.path, threads)
    found = logits(made, threads)
    types = {tensor.type_name for tensor in model.source.tensors}
    allowed = max(TOLERANCES.get(name, 0.0) for name in types)
    difference = float(np.abs(found - base).max() / np.abs(base).max())
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


def draw(site: Site, random: np.random.Generator, *, online: bool) -> SiteTransform:
    """A transform of all the parts that the site has a place for."""

    def powers(n: int, largest: int) -> Tensor:
        signs = random.choice([-1.0, 1.0], n)
        return torch.from_numpy(signs * np.exp2(random.integers(-largest, largest + 1, n)))

    parts = {"diag": torch.ones(site.n, dtype=torch.float64)}
    if site.fold is not None:
        n = site.n_head_kv * site.head_dim if site.head_dim else site.n
        parts["diag"] = expand(site, powers(n, 2))
        if site.mixes_heads and site.head_dim:
            parts["head"] = torch.diag(powers(site.head_dim, 1))
    if site.online and online:
        n1 = next(d for d in range(math.isqrt(site.n), 0, -1) if site.n % d == 0)
        parts |= {"left": torch.diag(powers(n1, 1)), "right": torch.diag(powers(site.n // n1, 1))}
    return SiteTransform(
        parts["diag"], head=parts.get("head"), left=parts.get("left"), right=parts.get("right")
    )


def _write(model: ModelSites, work: Path, *, online: bool, threads: int) -> Path:
    source, random = model.source, np.random.default_rng(0)
    types = {tensor.name: tensor.type_name for tensor in source.tensors}
    job = Job(types, "rtn", model.read, threads=threads)
    tensors: dict[str, Stored] = {}
    folds: list[Folded | None] = []
    with track(source.n_blocks, "proof", "blocks") as advance:
        for index in range(source.n_blocks):
            sites = {anchor: site for anchor, site in model.block(index).items() if site.kind}
            drawn = {anchor: draw(site, random, online=online) for anchor, site in sites.items()}
            packed, findings = encode_block(sites, None, drawn, job)
            save(block_path(work, index), packed, findings)
            stored, found = load(block_path(work, index))
            tensors |= stored
            folds.append(found.folded)
            advance(1)
    prepared = Prepared(
        tensors=tensors,
        mix="",
        transform="flatquant" if online else "awq",
        rounding="rtn",
        hadamard=(),
        clip=(),
        activation=None,
        errors={},
        folds=[its for its in folds if its is not None],
    )
    out = work / "proof.gguf"
    choices = [Choice(tensor.name, tensor.type_name, "") for tensor in source.tensors]
    write(source, out, choices, None, None, prepared=prepared, threads=threads)
    return out
