"""The sites of a model's blocks: the observer's table, and the weights of a float GGUF file.

What the graph allows decides. A site degrades, it is never refused: without a fold its diagonal is 1, without
``online`` there is no Kronecker product; its matrices are rounded by what was observed in any case.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ggml_ext.core.errors import listed
from ggml_ext.core.registry import FLOAT_TYPES, OWN_TYPES
from ggml_ext.gguf.source import Source, read_floats, reading
from ggml_ext.methods.sites import Fold, Linear, Site
from ggml_ext.observe import sites as observed

_NAME = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class _Roles:
    """The matrices that read a site, by what a transform does for them (Site)."""

    linears: Sequence[str]
    folded: Sequence[str]
    also: Sequence[str]
    online: bool


@dataclass(frozen=True)
class ModelSites:
    """``types``: GGUF tensor -> the type that it gets."""

    source: Source
    table: observed.Table
    types: Mapping[str, str]

    @cached_property
    def _tensors(self) -> dict[str, tuple[int, ...]]:
        return {tensor.name: tensor.dims for tensor in self.source.tensors}

    @cached_property
    def _only_floats(self) -> bool:
        return not any(map(self._rounds, self._tensors))

    def block(self, index: int, *, weights: bool = True) -> dict[str, Site]:
        """The sites of block ``index`` by anchor, with the weights of their matrices: those where something
        is rounded, or all of a file of floats. weights: read them; else they have shapes alone (torch's
        device "meta")."""
        found: dict[str, Site] = {}
        for site in self.table.sites:
            if _block_of(site.anchor) == index:
                roles = self._roles(site)
                if roles.linears:
                    built = self._site(site, roles, weights=weights)
                    found[built.anchor] = built
        return found

    def marks(self, index: int) -> bool:
        """Whether block ``index`` has to hold a stored factor: the first that can have an online transform,
        in a file without a type that stock llama.cpp refuses."""
        first = min(
            (
                block
                for site in self.table.sites
                if (block := _block_of(site.anchor)) is not None and self._roles(site).online
            ),
            default=None,
        )
        return first == index and not set(OWN_TYPES) & set(self.types.values())

    @property
    def outside(self) -> list[str]:
        """Matrices outside the blocks that are rounded and read a site."""
        return [
            reader.tensor
            for site in self.table.sites
            if _block_of(site.anchor) is None
            for reader in site.readers
            if len(self._tensors.get(reader.tensor, ())) == 2 and self._rounds(reader.tensor)
        ]

    def remarks(self, transform: str) -> list[str]:
        """One line for each reason why matrices get less than all that was asked for. transform: its name."""
        rounded = [name for name in self._tensors if _block_of(name) is not None and self._rounds(name)]
        unseen = [name for name in rounded if self.table.site_of(name) is None]
        lines = []
        if unseen:
            uses = sorted({self.table.others.get(name, observed.NEVER) for name in unseen})
            lines.append(
                f"nothing is known of what reads {listed(unseen)} ({', '.join(uses)}): rounded to nearest"
            )
        bare = [name for name in rounded if name not in unseen and not self.transforms(name)]
        if transform != "none" and bare:
            lines.append(f"no place for a transform before {listed(bare)}: rounded without")
        return lines

    def transforms(self, name: str) -> bool:
        """Whether something can be done to what the matrix reads."""
        site = self.table.site_of(name)
        if site is None or _block_of(site.anchor) is None:
            return False
        roles = self._roles(site)
        return self._fold(site) is not None or (roles.online and name in roles.linears)

    def read(self, name: str) -> Tensor:
        """A tensor of the file, float32, dimensions in C order."""
        tensor = next(tensor for tensor in self.source.tensors if tensor.name == name)
        with reading(tensor) as file:
            rows = read_floats(file, tensor, 0, tensor.n_rows)
        return torch.from_numpy(rows.reshape(tensor.dims[::-1]))

    def _rounds(self, name: str) -> bool:
        return self.types.get(name, "f32") not in FLOAT_TYPES and len(self._tensors[name]) > 1

    def _linears(self, names: Sequence[str], *, weights: bool) -> tuple[Linear, ...]:
        return tuple(
            Linear(
                name, self.read(name) if weights else torch.empty(self._tensors[name][::-1], device="meta")
            )
            for name in names
        )

    def _roles(self, site: observed.Site) -> _Roles:
        """What stays in float32 among matrices that do not is nothing to transform: a router. Nor is a site
        where nothing is rounded, but for files of floats."""
        names = [reader.tensor for reader in site.readers if reader.tensor in self._tensors]
        matrices = [name for name in names if len(self._tensors[name]) > 1]
        heavy = [name for name in matrices if self.types.get(name, "f32") != "f32"] or matrices
        if not (self._only_floats or any(map(self._rounds, heavy))):
            return _Roles((), (), names, online=False)
        also = [name for name in names if name not in heavy]
        reached = {reader.tensor for reader in site.readers if reader.online}
        linears = [name for name in heavy if name in reached]
        if not linears:
            return _Roles(heavy, (), also, online=False)
        return _Roles(linears, [name for name in heavy if name not in reached], also, online=True)

    def _site(self, site: observed.Site, roles: _Roles, *, weights: bool) -> Site:
        fold = self._fold(site)
        heads = site.fold if fold is not None else None
        return Site(
            anchor=roles.linears[0].removesuffix(".weight"),
            n=site.n,
            linears=self._linears(roles.linears, weights=weights),
            fold=fold,
            folded=self._linears(roles.folded, weights=weights),
            also=tuple(roles.also),
            online=roles.online,
            n_head=heads.n_head if heads else 0,
            n_head_kv=heads.n_head_kv if heads else 0,
            head_dim=heads.head_dim if heads else 0,
            mixes_heads=heads.mixes_heads if heads else False,
        )

    def _fold(self, site: observed.Site) -> Fold | None:
        """What the graph found, if all of it is in one block, since blocks are done one by one, and unless a
        matrix of the block might read the site in another graph (that of flash attention, say)."""
        found, block = site.fold, _block_of(site.anchor)
        if found is None:
            return None
        concerned = {found.tensor, found.bias or found.tensor, *(reader.tensor for reader in site.readers)}
        if not concerned <= self._tensors.keys() or {_block_of(name) for name in concerned} != {block}:
            return None
        unread = [
            name
            for name, use in self.table.others.items()
            if use == observed.NEVER and _block_of(name) == block
        ]
        if any(len(dims := self._tensors.get(name, ())) > 1 and dims[0] == site.n for name in unread):
            return None
        return Fold(found.tensor, found.kind != "gain", first=found.first, n=found.n, bias=found.bias)


def _block_of(name: str) -> int | None:
    match = _NAME.match(name)
    return None if match is None else int(match[1])
