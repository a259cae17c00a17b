"""The sites of a model: what its matrices read, as llama.cpp's own graph says.

A site is one activation, or several that share a reader, with the matrices that read it. It is named after
its first reader in the order of the graph, its anchor. The table comes from ggml_ext_observer_table as JSON;
docs/observe.md has the fields. Unknown fields are those of a newer library and mean nothing here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ggml_ext.core.errors import GgmlExtError

ROUTED = "MUL_MAT_ID"
"""Product in which every token has experts of its own."""

NEVER = "never"
"""Use of a weight that the graph lacks."""

_MOST = 2**31 - 1  # of the library's counts
_TAKE_ROUNDED = ("MUL_MAT", "GET_ROWS")  # as a use begins: a product may be of a part, or with other values


@dataclass(frozen=True)
class Reader:
    """A matrix that reads a site. ``tensor``: its name in the file. ``op``: "MUL_MAT" or "MUL_MAT_ID".
    ``online``: whether a transform can be put before the product."""

    tensor: str
    op: str
    online: bool


@dataclass(frozen=True)
class FoldPlace:
    """Where the offline part of a site's transform can go. ``kind``: "gain", a vector; "rows", rows
    ``first`` to ``first`` + ``n`` - 1 of the matrix ``tensor``, or of the matrices of a stack one after the
    other where ``n`` is more than one has; "heads", the same for the rows of v, which attention hands on head
    by head. ``bias``: added to the same channels, or "". ``n_head`` and so on: of
    "heads", else 0."""

    kind: str
    tensor: str
    bias: str
    first: int
    n: int
    n_head: int = 0
    n_head_kv: int = 0
    head_dim: int = 0
    mixes_heads: bool = False


@dataclass(frozen=True)
class Site:
    """``n``: channels. ``experts``: matrices that each read a part of the rows, 0 where all rows are read by
    every reader. ``values``: names of the activations in llama.cpp's graph. ``rows``: per token. ``fold``:
    None where there is none, for ``reason``."""

    anchor: str
    n: int
    experts: int
    readers: tuple[Reader, ...]
    values: tuple[str, ...]
    rows: int
    fold: FoldPlace | None = None
    reason: str = ""

    @property
    def routed(self) -> bool:
        """Whether a reader's rows are chosen token by token."""
        return any(reader.op == ROUTED for reader in self.readers)


@dataclass(frozen=True)
class Table:
    """``sites``: in the order of the graph. ``others``: weight that reads no site -> how it is used, names of
    operations or NEVER."""

    sites: tuple[Site, ...]
    others: Mapping[str, str]

    @cached_property
    def _readers(self) -> dict[str, tuple[Site, Reader]]:
        return {reader.tensor: (site, reader) for site in self.sites for reader in site.readers}

    def site_of(self, tensor: str) -> Site | None:
        """The site that the tensor reads, None if it reads none."""
        found = self._readers.get(tensor)
        return None if found is None else found[0]

    def reader(self, tensor: str) -> Reader | None:
        """How the tensor reads it."""
        found = self._readers.get(tensor)
        return None if found is None else found[1]

    @cached_property
    def no_matrices(self) -> frozenset[str]:
        """Weights that are read otherwise than by products and row by row: llama.cpp's other operations do
        not take quantised types."""
        return frozenset(
            name
            for name, use in self.others.items()
            if use != NEVER and not all(op.startswith(_TAKE_ROUNDED) for op in use.split(", "))
        )

    @property
    def widest(self) -> int:
        """Channels of the widest site."""
        return max((site.n for site in self.sites), default=0)


def parse(text: str) -> Table:
    """The table from JSON. Raises GgmlExtError for anything else."""
    try:
        return from_json(json.loads(text))
    except (ValueError, RecursionError) as exc:
        raise GgmlExtError(f"no table of sites ({exc}); reinstall ggml-ext with pip") from exc


def from_json(facts: Any) -> Table:
    """The table from parsed JSON. Raises ValueError, saying what is wrong."""
    try:
        sites = tuple(_site(site) for site in facts["sites"])
        others = {_text(other["tensor"]): _text(other["use"]) for other in facts.get("others", [])}
    except (TypeError, KeyError, AttributeError) as exc:
        raise ValueError(f"a field is missing or of another type: {exc}") from exc
    anchors = {site.anchor for site in sites}
    tensors = [reader.tensor for site in sites for reader in site.readers]
    if len(anchors) != len(sites) or len(set(tensors)) != len(tensors):
        raise ValueError("an anchor or a tensor occurs twice")
    return Table(sites, others)


def _site(facts: Any) -> Site:
    n, experts, rows = facts["n"], facts["experts"], facts["rows"]
    if not (_count(n) and n > 0 and _count(experts) and _count(rows) and rows > 0):
        raise ValueError(f"site {facts['anchor']} has impossible sizes")
    readers = tuple(Reader(_text(r["tensor"]), _text(r["op"]), bool(r["online"])) for r in facts["readers"])
    fold = facts.get("fold", {})
    return Site(
        _text(facts["anchor"]),
        n,
        experts,
        readers,
        tuple(map(_text, facts["values"])),
        rows,
        _fold(fold) if "kind" in fold else None,
        _text(fold.get("reason", "")),
    )


def _fold(facts: Any) -> FoldPlace:
    numbers = {name: facts.get(name, 0) for name in ("first", "n", "n_head", "n_head_kv", "head_dim")}
    if not all(map(_count, numbers.values())):
        raise ValueError(f"the fold {facts['kind']} of {facts['tensor']} has impossible sizes")
    mixes = bool(facts.get("mixes_heads", False))
    return FoldPlace(
        _text(facts["kind"]), _text(facts["tensor"]), _text(facts["bias"]), mixes_heads=mixes, **numbers
    )


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no string")
    return value
