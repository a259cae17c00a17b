"""Keys and values of a text, and how much later tokens look at them: what codebooks are fitted to.

Keys are as they are before RoPE, values as the cache stores them. With p(q, t) the attention probability of
query q on token t, a token's weight for a KV head is

    w_t = m_t / mean(m) + 0.02,  m_t = mean over q > t + 128 of the sum over the head's query heads of p(q, t)

since a cache codes tokens that many queries are behind. A window's last tokens, which no query is that far
behind, are left out, and so are its first ones, which a cache keeps as they are: attention that rests on them
would outweigh all others.
"""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggml_ext.core.atomic import atomic_path
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.gguf.source import Source
from ggml_ext.observe.nodes import NodeReader, heads_per_layer
from ggml_ext.runtime.rope import Rope, rope_of

BEHIND = 129
"""Queries that count are so many tokens behind, or more."""

SINKS = 16
"""First tokens of a window that a cache does not code."""

ALIGNED = 32
"""Channels that a head of a coded cache is a multiple of."""

_NODE = re.compile(r"(?:([KV])cur(?:_\w+)?|kq_soft_max)-(\d+)")
_LEAST = 0.02  # of the mean weight
_CHECKSUM_BYTES = 8
_HEADER_BYTES = 64  # what the header's length is a multiple of
_MOST_HEADER = 1 << 20

Half = NDArray[np.float16]


@dataclass(frozen=True)
class Heads:
    """Of a layer: ``n`` KV heads of ``k`` and ``v`` channels."""

    layer: int
    n: int
    k: int
    v: int


@dataclass(frozen=True)
class Sample:
    """Of one KV head: ``k`` float16 [tokens, k], ``v`` [tokens, v], ``weight`` float32 [tokens]."""

    k: Half
    v: Half
    weight: NDArray[np.float32]


class KvReader(NodeReader):
    """Sees a graph that reads a window of ``ctx`` tokens, and keeps ``rows`` of them."""

    def __init__(self, source: Source, ctx: int, rows: NDArray[np.int64]) -> None:
        super().__init__(_NODE)
        self.ctx, self.rows = ctx, rows
        self.kv_heads = heads_per_layer(source, "attention.head_count_kv", "codebooks")
        self._behind = np.tri(ctx, ctx - BEHIND, -BEHIND, dtype=np.float32)
        self._seen: dict[tuple[str, int], NDArray[np.float32]] = {}
        self._ropes: dict[int, Rope] = {}

    def clear(self) -> None:
        """Before a window."""
        self._seen.clear()
        self._ropes.clear()

    def take(self, tensor: Any, name: re.Match[str]) -> None:
        """A layer's keys, values or probabilities. Of several keys or values the last stay: what the cache
        stores has been through all of them."""
        kind, layer = name[1] or "weights", int(name[2])
        n = self.kv_heads[layer]
        values = self.values(tensor)
        if n == 0 or values.size % (self.ctx * n):
            return
        if kind == "weights":
            self._seen[kind, layer] = self._weights(values, n)
            return
        self._seen[kind, layer] = values.reshape(self.ctx, n, -1)[self.rows]
        if kind == "K":
            self._ropes[layer] = self._rope(tensor, layer)

    def _rope(self, tensor: Any, layer: int) -> Rope:
        channels = self._seen["K", layer].shape[2]
        try:
            return rope_of(int(self._ffi.cast("uintptr_t", tensor)), channels)
        except GgmlExtError as error:
            raise GgmlExtError(f"keys of layer {layer}: {error}; use a quantised cache, -ctk q8_0") from error

    def _weights(self, values: NDArray[np.float32], n: int) -> NDArray[np.float32]:
        """Of the kept rows [n, rows]; values: of all query heads [heads, ctx, cells or more]."""
        by_head = values.reshape(n, -1, self.ctx, values.shape[3])[..., : self.ctx - BEHIND]
        counts = np.arange(self.ctx - BEHIND, 0, -1)
        weights = []
        for head in by_head:
            mean = np.einsum("hqt,qt->t", head, self._behind, dtype=np.float32) / counts
            total = mean[SINKS:].mean()
            weights.append((mean / total if total > 0 else np.zeros_like(mean)) + _LEAST)
        return np.array(weights, np.float32)[:, self.rows]

    def heads(self) -> list[Heads]:
        """Layers of which the graph has shown all, in heads that codebooks can be of."""
        found = []
        for layer, n in enumerate(self.kv_heads):
            if all((kind, layer) in self._seen for kind in ("K", "V", "weights")):
                k, v = (self._seen[kind, layer].shape[2] for kind in "KV")
                if k % ALIGNED == v % ALIGNED == 0:
                    found.append(Heads(layer, n, k, v))
        return found

    def sample(self, heads: Heads) -> Half:
        """[n, rows, k + v + 1]: keys before RoPE, values, weights. Raises GgmlExtError for values that
        float16 has not."""
        k = self._ropes[heads.layer].undo(self._seen["K", heads.layer], self.rows)
        weights = self._seen["weights", heads.layer].T[..., None]
        with np.errstate(over="ignore"):
            both = np.concatenate([k, self._seen["V", heads.layer], weights], 2).astype(np.float16)
        if not np.isfinite(both).all():
            raise GgmlExtError(
                f"layer {heads.layer}: keys or values beyond float16, or NaN; codebooks need another model"
            )
        return np.ascontiguousarray(both.swapaxes(0, 1))


class SampleFile:
    """Samples of the first ``windows`` windows, ``tokens`` of each, in a file that grows by window.

    A header line, JSON; then for each window the layers' samples, float16 [n, tokens, k + v + 1] each, and
    the CRC-32 of header and samples as 8 bytes. What a killed run has left of a window, and what is damaged
    from a window on, is read again.
    """

    def __init__(self, path: Path, of: str, tokens: int) -> None:
        """Raises GgmlExtError for a file that is no such state, and for one of another fit."""
        self.path, self.of, self.tokens = path, of, tokens
        self.windows = 0
        self.layers: list[Heads] = []
        if path.exists():
            self._open()

    @property
    def _counts(self) -> list[int]:
        return [heads.n * self.tokens * (heads.k + heads.v + 1) for heads in self.layers]

    @property
    def _record_bytes(self) -> int:
        return 2 * sum(self._counts) + _CHECKSUM_BYTES

    def add(self, reader: KvReader) -> None:
        """A window that the reader has seen. Raises GgmlExtError where it cannot be written, and for layers
        other than before."""
        layers = reader.heads()
        if self.windows and layers != self.layers:
            raise GgmlExtError(f"{self.path}: the graph differs between windows; delete it to begin anew")
        self.layers = layers
        data = b"".join(reader.sample(heads).tobytes() for heads in layers)
        record = data + self._checksum(data)
        if self.windows:
            self._append(record)
        else:
            with atomic_path(self.path) as path:
                path.write_bytes(self._header() + record)
        self.windows += 1

    def head(self, heads: Heads, number: int, windows: list[int]) -> Sample:
        """Of one KV head, in these windows."""
        place = self.layers.index(heads)
        first = sum(self._counts[:place])
        rows = np.concatenate(
            [
                np.memmap(
                    self.path,
                    np.float16,
                    "r",
                    self._at(window) + 2 * first,
                    (heads.n, self.tokens, heads.k + heads.v + 1),
                )[number]
                for window in windows
            ]
        )
        k, v, weight = np.split(rows, [heads.k, heads.k + heads.v], axis=1)
        return Sample(k, v, weight[:, 0].astype(np.float32))

    def _header(self) -> bytes:
        facts = {"ggml-ext": "codebooks", "of": self.of, "tokens": self.tokens}
        text = json.dumps({**facts, "layers": [astuple(heads) for heads in self.layers]})
        length = -(-(len(text) + 1) // _HEADER_BYTES) * _HEADER_BYTES
        return text.ljust(length - 1).encode() + b"\n"

    def _append(self, record: bytes) -> None:
        try:
            with self.path.open("r+b") as file:
                file.seek(self._at(self.windows))
                file.write(record)
                file.truncate()
        except OSError as error:
            raise GgmlExtError(
                f"cannot write: {self.path} ({error.strerror}); free some space or choose a writable place"
            ) from error

    def _at(self, window: int) -> int:
        return len(self._header()) + window * self._record_bytes

    def _checksum(self, data: bytes) -> bytes:
        return zlib.crc32(data, zlib.crc32(self._header())).to_bytes(_CHECKSUM_BYTES, "little")

    def _open(self) -> None:
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            header = file.readline(_MOST_HEADER)
            of, tokens, self.layers = self._facts(header)
            if (of, tokens) != (self.of, self.tokens):
                raise GgmlExtError(
                    f"{self.path}: begun with another model, text or options; delete it to begin anew"
                )
            while header == self._header() and self._at(self.windows + 1) <= size:
                data = file.read(self._record_bytes - _CHECKSUM_BYTES)
                if file.read(_CHECKSUM_BYTES) != self._checksum(data):
                    break
                self.windows += 1

    def _facts(self, header: bytes) -> tuple[str, int, list[Heads]]:
        try:
            facts = json.loads(header)
            if facts["ggml-ext"] != "codebooks":
                raise ValueError("another kind of file")
            return facts["of"], facts["tokens"], [Heads(*map(int, heads)) for heads in facts["layers"]]
        except Exception as error:  # of every kind, since the file decides what fails
            raise GgmlExtError(f"{self.path}: no state of codebooks, or damaged; delete it") from error
