"""Drives the observer of ggml-ext.h over a model: the table of sites, and the sums of some windows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggml_ext.observe.observer import LARGEST_TOKEN
from ggml_ext.runtime.llama import Model
from ggml_ext.runtime.native import llama_library

PANEL = 256

_MOMENT = 1  # GGML_EXT_MOMENTS_SHARED

Float = NDArray[np.float32]


def tempered(x: NDArray[Any]) -> NDArray[Any]:
    """What is summed of the rows x [tokens, n] of a batch: the largest are scaled down."""
    power = np.square(x).sum(1)
    limit = LARGEST_TOKEN * np.sort(power)[(len(power) - 1) // 2]
    return x * np.sqrt(np.minimum(1, limit / power))[:, None]


@dataclass(frozen=True)
class SiteSums:
    """A block of sums, see struct ggml_ext_site_sums.

    ``diagonal`` [n]: of the moment of all rows, of which there are ``tokens``. ``by_expert`` [experts] and
    ``diagonals`` [experts][n]: the same of the rows of each expert.
    """

    tokens: float
    by_expert: Float
    diagonal: Float
    diagonals: Float


class ObservedModel:
    """A loaded model and an observer, with a context of one window: ``ctx`` tokens in ``n_seq`` sequences of
    one length; exact, as for an observation. Close it, or use it in ``with``."""

    def __init__(self, path: Path, ctx: int, n_seq: int = 1) -> None:
        self._ffi, self._library = llama_library()
        self.ctx, self.n_seq, self.model = ctx, n_seq, Model(path, threads=1)
        new, free = self._library.ggml_ext_observer_new, self._library.ggml_ext_observer_free
        self._observer = self._ffi.gc(new(1), free)
        callback = self._ffi.addressof(self._library, "ggml_ext_observer_eval")
        addresses = [int(self._ffi.cast("uintptr_t", its)) for its in (callback, self._observer)]
        self.model.start(
            n_ctx=ctx // n_seq,
            n_seq=n_seq,
            n_batch=ctx,
            observer=(addresses[0], addresses[1]),
            exact=True,
        )

    def table(self) -> dict[str, Any]:
        """The JSON table of the graph that was built last."""
        found: dict[str, Any] = json.loads(
            self._ffi.string(self._library.ggml_ext_observer_table(self._observer))
        )
        return found

    def decode(self, tokens: NDArray[np.int32]) -> Float:
        """Logits [ctx, vocabulary] of one window: a view that the next decode overwrites."""
        each = self.ctx // self.n_seq
        at = np.arange(self.ctx, dtype=np.int32)
        self.model.clear()
        return self.model.decode(tokens, at % each, at // each, np.ones(self.ctx, np.bool_))

    def sums(self, windows: NDArray[np.int32], token_weights: Float | None = None) -> list[SiteSums]:
        """The sums over ``windows`` [n, ctx], a block for each site of the table in its order.

        ``token_weights`` [ctx]: how much a window's tokens count, 1 by default.
        """
        ffi, library, sites = self._ffi, self._library, self.table()["sites"]
        sizes = [library.ggml_ext_observer_size(site["n"], site["experts"], _MOMENT) for site in sites]
        blocks = [np.zeros(size, np.float32) for size in sizes]
        largest = [np.zeros(site["n"], np.float32) for site in sites]
        into = ffi.new("struct ggml_ext_site_sums[]", len(sites))
        for its, block, absmax in zip(into, blocks, largest, strict=True):
            its.before = its.after = ffi.from_buffer("float[]", block)
            its.moments = _MOMENT
            its.absmax, its.sample_stride = ffi.from_buffer("float[]", absmax), 1
        assert library.ggml_ext_observer_sums(self._observer, len(sites), into) == 0
        weights = ffi.NULL if token_weights is None else ffi.from_buffer("float[]", token_weights)
        for i, window in enumerate(windows):
            status = library.ggml_ext_observer_begin(self._observer, i * self.ctx, self.ctx, 0.0, weights)
            assert status == 0
            self.decode(window)
            seen = library.ggml_ext_observer_end(self._observer)
            culprit = ffi.string(library.ggml_ext_observer_culprit(self._observer)).decode()
            assert seen == len(sites), f"window {i}: {seen} of {len(sites)} sites; culprit {culprit!r}"
        return [_sums(site["n"], site["experts"], block) for site, block in zip(sites, blocks, strict=True)]

    def close(self) -> None:
        self.model.close()

    def __enter__(self) -> ObservedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _sums(n: int, experts: int, block: Float) -> SiteSums:
    at = 1 + experts
    diagonal = np.empty(n, np.float32)
    for first in range(0, n, PANEL):
        rows, width = min(PANEL, n - first), n - first
        diagonal[first : first + rows] = block[at : at + rows * width : width + 1][:rows]
        at += rows * width
    return SiteSums(float(block[0]), block[1 : 1 + experts], diagonal, block[at:].reshape(experts, n))
