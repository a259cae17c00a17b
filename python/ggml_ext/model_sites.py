"""The sites of a model's blocks: the observer's table, and the weights of a float GGUF file.

What the graph allows at a site and what a file can say of it (docs/gguf.md) decide together. A site
degrades, it is never refused: without a fold its diagonal is 1, without ``online`` there is no Kronecker
product, and without a place in the file there is no transform at all; its matrices are rounded by what was
observed in any case.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from ggml_ext.errors import listed
from ggml_ext.observe import sites as observed
from ggml_ext.rules import FLOAT_TYPES
from ggml_ext.sites import Fold, Linear, Site, SiteKind
from ggml_ext.source import Source, read_floats, reading

_LAYOUTS: Sequence[tuple[SiteKind, tuple[str, ...], str]] = (
    ("attn_in", ("attn_q", "attn_k", "attn_v"), ""),
    ("attn_in", ("attn_qkv",), ""),
    ("attn_out", ("attn_output",), ""),
    ("ffn_in", ("ffn_gate", "ffn_up"), ""),
    ("ffn_in", ("ffn_up",), "ffn_gate"),
    ("ffn_in", ("ffn_gate_exps", "ffn_up_exps"), ""),
    ("ffn_mid", ("ffn_down",), ""),
    ("ffn_mid", ("ffn_down_exps",), ""),
)
"""Kind, the matrices that read it, its anchor first, and a matrix beside which the row does not hold: the
table of docs/gguf.md, and of ggml_ext/llama/transform-load.cpp."""

_MAKERS = {"attn_out": ("attn_v", "attn_qkv"), "ffn_mid": ("ffn_up", "ffn_up_exps")}
"""The matrices whose last rows a file's record of folds can speak of."""

_NAME = re.compile(r"blk\.(\d+)\.(.+)\.weight")


@dataclass(frozen=True)
class ModelSites:
    """``types``: GGUF tensor -> the type that it gets."""

    source: Source
    table: observed.Table
    types: Mapping[str, str]

    @cached_property
    def _tensors(self) -> dict[str, tuple[int, ...]]:
        return {tensor.name: tensor.dims for tensor in self.source.tensors}

    def block(self, index: int) -> dict[str, Site]:
        """The sites of block ``index`` by anchor, with their weights: those with a place in the file, and
        others that a matrix reads which is to be rounded."""
        found: dict[str, Site] = {}
        for site in self.table.sites:
            if _block_of(site.anchor + ".weight") == index:
                built = self._site(index, site)
                if built.linears or built.folded:
                    found[built.anchor] = built
        return found

    def marks(self, index: int) -> bool:
        """Whether block ``index`` has to hold a stored factor: the first that can have a transform, in a file
        without a type that stock llama.cpp refuses."""
        first = min(
            (
                block
                for site in self.table.sites
                if (block := _block_of(site.anchor + ".weight")) is not None
                and self._place(block, [reader.tensor for reader in site.readers])[0]
            ),
            default=None,
        )
        return first == index and "fq4" not in self.types.values()

    def remarks(self, transform: str) -> list[str]:
        """One line for each reason why matrices get less than all that was asked for. transform: its name."""
        rounded = [name for name in self._tensors if _block_of(name) is not None and self._rounds(name)]
        unseen = [name for name in rounded if self.table.site_of(name) is None]
        lines = []
        if unseen:
            uses = sorted({self.table.others.get(name, "never") for name in unseen})
            lines.append(
                f"nothing is known of what reads {listed(unseen)} ({', '.join(uses)}): rounded to nearest"
            )
        bare = [name for name in rounded if name not in unseen and not self._transforms(name)]
        if transform != "none" and bare:
            lines.append(f"no place for a transform before {listed(bare)}: rounded without")
        return lines

    def _transforms(self, name: str) -> bool:
        """Whether the file has a place for a transform of what the matrix reads."""
        site = self.table.site_of(name)
        block = None if site is None else _block_of(site.anchor + ".weight")
        if site is None or block is None:
            return False
        return self._place(block, [reader.tensor for reader in site.readers])[0] != ""

    def read(self, name: str) -> Tensor:
        """A tensor of the file, float32, dimensions in C order."""
        tensor = next(tensor for tensor in self.source.tensors if tensor.name == name)
        with reading(tensor) as file:
            rows = read_floats(file, tensor, 0, tensor.n_rows)
        return torch.from_numpy(rows.reshape(tensor.dims[::-1]))

    def _rounds(self, name: str) -> bool:
        return self.types.get(name, "f32") not in FLOAT_TYPES and len(self._tensors[name]) > 1

    def _linears(self, names: Sequence[str]) -> tuple[Linear, ...]:
        return tuple(Linear(name, self.read(name)) for name in names)

    def _site(self, index: int, site: observed.Site) -> Site:
        names = [reader.tensor for reader in site.readers if reader.tensor in self._tensors]
        kind, matrices = self._place(index, names)
        if not kind:
            rounded = [name for name in names if self._rounds(name)]
            return Site("", site.anchor, site.n, self._linears(rounded), None, online=False)
        others = [name for name in names if name not in matrices]
        fold = self._fold(index, kind, site.fold)
        heads = site.fold if kind == "attn_out" and fold is not None else None
        return Site(
            kind=kind,
            anchor=matrices[0].removesuffix(".weight"),
            n=site.n,
            linears=self._linears(matrices),
            fold=fold,
            folded=self._linears([name for name in others if self._rounds(name)]),
            also=tuple(name for name in others if not self._rounds(name)),
            online=all(reader.online for reader in site.readers if reader.tensor in matrices),
            n_head=heads.n_head if heads else 0,
            n_head_kv=heads.n_head_kv if heads else 0,
            head_dim=heads.head_dim if heads else 0,
            mixes_heads=heads.mixes_heads if heads else False,
        )

    def _place(self, index: int, names: Sequence[str]) -> tuple[SiteKind | Literal[""], list[str]]:
        """The kind and the matrices of the layout that ``names`` fit; "" where none does, or where the
        block has two of a kind, which a file cannot tell apart."""

        def tensor(matrix: str) -> str:
            return f"blk.{index}.{matrix}.weight"

        rows = [
            (kind, [tensor(matrix) for matrix in matrices])
            for kind, matrices, unless in _LAYOUTS
            if tensor(matrices[0]) in self._tensors and not (unless and tensor(unless) in self._tensors)
        ]
        for kind, wanted in rows:
            if set(wanted) <= set(names):
                return (kind, wanted) if [row[0] for row in rows].count(kind) == 1 else ("", [])
        return "", []

    def _fold(self, index: int, kind: SiteKind, found: observed.FoldPlace | None) -> Fold | None:
        """What the graph found, where the file can record it."""
        if found is None:
            return None
        if kind in ("attn_in", "ffn_in"):
            gain = found.kind == "gain"
            return Fold(found.tensor, rows=False, n=found.n, bias=found.bias) if gain else None
        if found.kind != ("heads" if kind == "attn_out" else "rows"):
            return None
        makers = [f"blk.{index}.{name}.weight" for name in _MAKERS[kind]]
        if found.tensor not in makers or found.first + found.n != self._tensors[found.tensor][1]:
            return None
        return Fold(found.tensor, rows=True, first=found.first, n=found.n, bias=found.bias)


def _block_of(tensor: str) -> int | None:
    match = _NAME.fullmatch(tensor)
    return None if match is None else int(match[1])
