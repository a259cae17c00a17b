"""Folds at random what the observer's table says can be folded: the model must stay what it was.

A diagonal of signed powers of two changes no rounding. Another order of a head's channels changes that of the
sums over them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggml_ext.gguf.source import open_gguf

Float = NDArray[np.float32]
Change = Callable[[Float], Float]


class _Weights:
    """A file's weights, to be changed in place."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tensors = {tensor.name: tensor for tensor in open_gguf(path).tensors}

    def change(self, name: str, change: Change) -> None:
        """``change`` gets the tensor, rows first, and returns one of its shape."""
        tensor = self._tensors[name]
        dtype, shape = {"f32": np.float32, "f16": np.float16}[tensor.type_name], tensor.dims[::-1]
        data = np.memmap(self._path, dtype, "r+", tensor.offset, shape)
        data[...] = change(data.astype(np.float32)).astype(dtype)

    def change_part(self, name: str, fold: dict[str, Any], change: Change) -> None:
        """Those of its rows, or of a bias, that ``fold`` means: ``change`` gets [n, ...] of each expert."""
        first, end = fold["first"], fold["first"] + fold["n"]
        is_bias = name == fold["bias"]

        def part(data: Float) -> Float:
            if is_bias:
                experts = data.reshape(-1, data.shape[-1], 1)
            else:  # more rows than one matrix has: those of all
                experts = data.reshape(-1, max(data.shape[-2], end), data.shape[-1])
            for expert in experts:
                expert[first:end] = change(expert[first:end])
            return experts.reshape(data.shape)

        self.change(name, part)


def fold_all(path: Path, sites: list[dict[str, Any]], seed: int = 0) -> int:
    """Folds at every site that can be, in the file. Returns their number."""
    weights, random = _Weights(path), np.random.default_rng(seed)
    folded = [site for site in sites if "kind" in site["fold"]]
    for site in folded:
        made, read = (
            _heads(site["fold"], random)
            if site["fold"]["kind"] == "heads"
            else _diagonal(site["fold"], random)
        )
        for name in filter(None, (site["fold"]["tensor"], site["fold"]["bias"])):
            if site["fold"]["kind"] == "gain":
                weights.change(name, lambda data, made=made: made(data.reshape(-1, 1)).reshape(data.shape))
            else:
                weights.change_part(name, site["fold"], made)
        for reader in site["readers"]:
            weights.change(reader["tensor"], read)
    return len(folded)


def _powers(random: np.random.Generator, *shape: int) -> Float:
    return (random.choice([-1.0, 1.0], shape) * 2.0 ** random.integers(-1, 2, shape)).astype(np.float32)


def _diagonal(fold: dict[str, Any], random: np.random.Generator) -> tuple[Change, Change]:
    """What becomes of [n, ...] that make the channels, and of [..., n] that read them."""
    scale = _powers(random, fold["n"])
    return lambda made: made / scale[:, None], lambda read: read * scale


def _heads(fold: dict[str, Any], random: np.random.Generator) -> tuple[Change, Change]:
    """The same for v [n_head_kv * head_dim, ...] and its readers [..., n_head * head_dim]."""
    n_kv, dim = fold["n_head_kv"], fold["head_dim"]
    scale, order = _powers(random, n_kv, dim), np.tile(np.arange(dim), (n_kv, 1))
    if fold["mixes_heads"]:
        order = random.permuted(order, axis=1)

    def make(made: Float) -> Float:
        heads = made.reshape(n_kv, dim, -1)
        return (np.take_along_axis(heads, order[..., None], 1) / scale[..., None]).reshape(made.shape)

    def read(matrix: Float) -> Float:
        heads = matrix.reshape(*matrix.shape[:-1], n_kv, -1, dim)
        mixed = np.take_along_axis(heads, np.broadcast_to(order[:, None], heads.shape), -1) * scale[:, None]
        return mixed.reshape(matrix.shape)

    return make, read
