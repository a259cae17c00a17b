"""Probes of a KV cache: which keys later tokens will look at, read off what each key is made from.

A window of T tokens is read twice in a row. What the second reading looks at in the first is what it takes to
say the window again, whatever will be asked (KVzip, arXiv 2505.23416). With p(q, t) the attention probability
of query q, in the second reading, on token t of the first, the value of a KV head's key t is

    y_t = log(max over q and over the query heads of the KV head of p(q, t) + 1e-6)

and a probe predicts it from x_t, what attn_k reads (a linear KVzap, arXiv 2601.07891): by least squares with
a ridge, the one of several that predicts the windows held out best.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggml_ext.core.atomic import atomic_path
from ggml_ext.core.errors import GgmlExtError, Warn
from ggml_ext.core.progress import track
from ggml_ext.gguf.source import Source, open_gguf
from ggml_ext.observe.nodes import NodeReader, heads_per_layer, reading_of
from ggml_ext.observe.samples import read_text, windows
from ggml_ext.runtime.llama import Model

_NODE = re.compile(r"(attn_norm|kq_soft_max)-(\d+)")
_LEAST = 1e-6  # added to probabilities
_RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # of the mean of the moments' diagonal
_HELD_OUT = 8  # every so many windows one
_SAVE_SECONDS = 60.0
_PARTS, _NAMES = ("fitted", "held_out"), ("xx", "xy", "yy")

Floats = NDArray[np.float64]


@dataclass
class _Sums:
    """Over tokens, of x with a one behind it and of y: x x^T, x y^T, y^2."""

    xx: Floats
    xy: Floats
    yy: Floats

    @classmethod
    def zeros(cls, n: int, n_heads: int) -> _Sums:
        return cls(np.zeros((n, n)), np.zeros((n, n_heads)), np.zeros(n_heads))

    def add(self, x: Floats, y: Floats) -> None:
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += (y * y).sum(0)

    def error(self, solution: Floats) -> float:
        """Of the predictions x^T solution, squared and summed."""
        return float((solution * (self.xx @ solution - 2 * self.xy)).sum() + self.yy.sum())

    def correlations(self, solution: Floats) -> Floats:
        """Of predictions and y, for each head."""
        count, predicted, true = self.xx[-1, -1], self.xx[-1] @ solution, self.xy[-1]
        both = (solution * self.xy).sum(0) / count - predicted * true / count**2
        of_predicted = (solution * (self.xx @ solution)).sum(0) / count - (predicted / count) ** 2
        of_true = self.yy / count - (true / count) ** 2
        with np.errstate(divide="ignore", invalid="ignore"):
            found: Floats = both / np.sqrt(of_predicted * of_true)
        return np.nan_to_num(found)


@dataclass
class _Layer:
    """Of the windows that are fitted to, and of those held out."""

    fitted: _Sums
    held_out: _Sums


@dataclass(frozen=True)
class Probe:
    """``weight`` float32 [n_head_kv, n], ``bias`` [n_head_kv]; ``correlation``: of what it predicts with y,
    over the windows held out, a mean over heads."""

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    correlation: float


@dataclass(frozen=True)
class Probes:
    """By layer; layers without attention of their own have none."""

    layers: dict[int, Probe]
    tokens: int

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """As docs/gguf.md has them."""
        named = {}
        for index, probe in self.layers.items():
            named[f"blk.{index}.attn_k.kv_probe"] = probe.weight
            named[f"blk.{index}.attn_k.kv_probe_b"] = probe.bias
        return named

    @property
    def correlation(self) -> float:
        """Mean over layers."""
        return float(np.mean([probe.correlation for probe in self.layers.values()]))

    def summary(self) -> str:
        """One line for the end of a command."""
        return (
            f"probes of {len(self.layers)} layers, fitted on {self.tokens} tokens; correlation with what "
            f"later tokens looked at, in windows held out: {self.correlation:.2f}"
        )


class _Reader(NodeReader):
    """Sees the nodes of a graph that reads BOS or a first token, then the window twice."""

    def __init__(self, source: Source, window: int) -> None:
        super().__init__(_NODE)
        self.window = window
        self.heads = heads_per_layer(source, "attention.head_count", "probes")
        self.kv_heads = heads_per_layer(source, "attention.head_count_kv", "probes")
        self.inputs: dict[int, NDArray[np.float32]] = {}
        self.worth: dict[int, NDArray[np.float32]] = {}

    def take(self, tensor: Any, name: re.Match[str]) -> None:
        """Inputs and probabilities of a layer."""
        values, layer = self.values(tensor), int(name[2])
        n_tokens = 2 * self.window + 1
        first = slice(1, self.window + 1)
        if name[1] == "attn_norm":
            self.inputs[layer] = values.reshape(n_tokens, -1)[first].copy()
            return
        heads, kv_heads = self.heads[layer], self.kv_heads[layer]
        seen = values.reshape(heads, n_tokens, -1)[:, self.window + 1 :, first].max(1)
        self.worth[layer] = seen.reshape(kv_heads, heads // kv_heads, self.window).max(1).T


def _solve(layer: _Layer) -> Probe:
    n = len(layer.fitted.xx)
    scale = np.trace(layer.fitted.xx) / n
    tried = [
        np.linalg.solve(layer.fitted.xx + ridge * scale * np.eye(n), layer.fitted.xy) for ridge in _RIDGES
    ]
    best = min(tried, key=layer.held_out.error)
    return Probe(
        np.ascontiguousarray(best[:-1].T, np.float32),
        best[-1].astype(np.float32),
        float(layer.held_out.correlations(best).mean()),
    )


def fit(
    model: Path,
    text: Path,
    state: Path,
    *,
    samples: int,
    ctx: int,
    seed: int,
    threads: int | None,
    warn: Warn,
) -> Probes:
    """Fits a probe for every layer with attention, on at most ``samples`` windows of ``ctx`` tokens of the
    text. ``state``: a file of the sums while it runs; interrupted, the same call goes on from there.

    Takes 2 ctx tokens of context, and 16 n^2 bytes per layer for n channels, in memory and in ``state``.
    Raises GgmlExtError for a text of less than two windows, a ``state`` of another fit, and a graph that does
    not show what attention reads and weighs.
    """
    source = open_gguf(model)
    content = read_text(text)
    cut = windows(model, text, ctx=ctx, samples=samples, seed=seed, warn=warn, content=content)
    if len(cut) < 2:
        raise GgmlExtError(f"{text}: {len(cut)} window of {ctx} tokens; probes need two or more")
    sums = _State(state, reading_of(source, cut))
    reader = _Reader(source, ctx - 1)
    with Model(model, threads=threads) as loaded, track(len(cut), "probes", "windows") as advance:
        loaded.start(n_ctx=2 * ctx, n_seq=1, n_batch=2 * ctx - 1, exact=True, observer=(reader.address, 0))
        advance(sums.windows)
        try:
            for index in range(sums.windows, len(cut)):
                _read(loaded, reader, cut[index])
                held_out = index % _HELD_OUT == _HELD_OUT - 1 or index == len(cut) - 1
                sums.add(reader, held_out=held_out)
                advance(1)
        except KeyboardInterrupt:
            sums.save()
            warn(f"{state}: {sums.windows} of {len(cut)} windows are done; the same command goes on there")
            raise
    if not sums.layers:
        raise GgmlExtError(
            f"{model}: the graph of {source.arch} does not name what attention reads and weighs "
            "(attn_norm, kq_soft_max); use policy=norm"
        )
    fitted = {index: _solve(layer) for index, layer in sorted(sums.layers.items())}
    return Probes(fitted, len(cut) * (ctx - 1))


class _State:
    """The sums by layer, of the first ``windows`` windows, and the file that keeps them."""

    def __init__(self, path: Path, of: str) -> None:
        self.path, self.of = path, of
        self.windows = 0
        self.layers: dict[int, _Layer] = {}
        self._saved = time.monotonic()
        if path.exists():
            self._load()

    def add(self, reader: _Reader, *, held_out: bool) -> None:
        """A window that the reader has seen."""
        ones = np.ones((reader.window, 1), np.float32)
        for index in sorted(reader.inputs.keys() & reader.worth.keys()):
            x = np.concatenate([reader.inputs[index], ones], 1).astype(np.float64)
            y = np.log(reader.worth[index].astype(np.float64) + _LEAST)
            shape = x.shape[1], y.shape[1]
            layer = self.layers.setdefault(index, _Layer(_Sums.zeros(*shape), _Sums.zeros(*shape)))
            (layer.held_out if held_out else layer.fitted).add(x, y)
        self.windows += 1
        if time.monotonic() - self._saved > _SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Raises GgmlExtError where the file cannot be written."""
        arrays = {
            f"{index}.{part}.{name}": getattr(getattr(layer, part), name)
            for index, layer in self.layers.items()
            for part in _PARTS
            for name in _NAMES
        }
        with atomic_path(self.path) as path, path.open("wb") as file:
            np.savez(file, of=self.of, windows=self.windows, **arrays)
        self._saved = time.monotonic()

    def _load(self) -> None:
        try:
            with np.load(self.path) as stored:
                arrays = {name: stored[name] for name in stored.files}
            of, windows = str(arrays.pop("of")), int(arrays.pop("windows"))
            layers = _layers(arrays) if of == self.of else {}
        except Exception as error:  # of every kind, since the file decides what fails
            raise GgmlExtError(f"{self.path}: no state of probes, or damaged; delete it") from error
        if of != self.of:
            raise GgmlExtError(
                f"{self.path}: begun with another model, text or options; delete it to begin anew"
            )
        self.windows, self.layers = windows, layers


def _layers(arrays: Mapping[str, NDArray[Any]]) -> dict[int, _Layer]:
    """Of a state's arrays. Raises KeyError and ValueError for what no run has saved."""
    found = {}
    for index in {int(name.split(".")[0]) for name in arrays}:
        parts = []
        for part in _PARTS:
            sums = _Sums(*(arrays[f"{index}.{part}.{name}"] for name in _NAMES))
            wanted = _Sums.zeros(*sums.xy.shape)
            if any(
                (getattr(sums, name).shape, getattr(sums, name).dtype)
                != (getattr(wanted, name).shape, getattr(wanted, name).dtype)
                for name in _NAMES
            ):
                raise ValueError("sums of other shapes")
            parts.append(sums)
        found[index] = _Layer(*parts)
    return found


def _read(model: Model, reader: _Reader, window: NDArray[np.int64]) -> None:
    tokens = np.concatenate([window, window[1:]]).astype(np.int32)
    reader.inputs.clear()
    reader.worth.clear()
    model.clear()
    model.run(tokens, np.arange(len(tokens), dtype=np.int32), np.zeros(len(tokens), np.int32))
    if reader.error is not None:
        raise reader.error
