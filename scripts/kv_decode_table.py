#!/usr/bin/env python3
"""The table of docs/kv-cache.md: what a budget does to generation behind long contexts.

A random model of the 1B shape (devtools/bench_cpu) reads random tokens into the whole paged cache and into
one with a budget, both of q8_0. Then both generate in turns, and the time of each token, and of attention's
nodes in it, is compared pair by pair. What was read is kept in OUT_DIR, so an interrupted run goes on.

    scripts/kv_decode_table.py OUT_DIR [--depths 8192 65536] [--kv paged,25%,policy=attention] [-t THREADS]
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cffi
import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from devtools.bench_cpu import models
from devtools.bench_cpu.plan import LAYERS
from ggml_ext.core import paths
from ggml_ext.core.atomic import atomic_path
from ggml_ext.core.outputs import write_json
from ggml_ext.core.progress import track
from ggml_ext.runtime.cache_types import CacheTypes
from ggml_ext.runtime.llama import Model

SLOT_BYTES = 4 + 2 * 68  # a token of a head of 64: its position, K and V of q8_0
BATCH = 512
WHOLE = "paged"


class NodeTimes:
    """Times of attention's nodes in a graph, and of its norms; ``address`` is for an observer.

    A node that is observed is computed alone, which takes longer than the norm of one token does: so much is
    taken off attention's time.
    """

    def __init__(self) -> None:
        self.clear()
        self._begun = 0.0
        ffi = cffi.FFI()
        ffi.cdef("const char * ggml_get_name(const void *);")
        library = ffi.dlopen(str(paths.library("ggml-base")))

        def see(tensor: Any, ask: bool, _data: Any) -> bool:
            seconds = time.perf_counter() - self._begun
            name = ffi.string(library.ggml_get_name(tensor))
            for node, found in self._seconds.items():
                if not ask and name.startswith(node):
                    found.append(seconds)
            self._begun = time.perf_counter()
            return True

        self._kept = ffi, ffi.callback("bool(void *, bool, void *)", see)
        self.address = int(ffi.cast("uintptr_t", self._kept[1]))

    def clear(self) -> None:
        self._seconds: dict[bytes, list[float]] = {b"ext_kv_attend": [], b"norm-": []}

    @property
    def seconds(self) -> float:
        """Of attention, since ``clear``."""
        attention, norms = self._seconds.values()
        return sum(attention) - len(attention) * float(np.median(norms))


@dataclass
class Contender:
    """A cache that was filled; ``at``: the next position."""

    model: Model
    at: int

    def generate(self, n: int) -> float:
        """Seconds of n tokens, one by one."""
        begun = time.perf_counter()
        for _ in range(n):
            one = np.array([self.at % self.model.n_vocab], np.int32)
            self.model.decode(one, np.array([self.at], np.int32), np.zeros(1, np.int32), np.ones(1, np.bool_))
            self.at += 1
        return time.perf_counter() - begun


def _start(model: Model, kv: str, ctx: int, times: NodeTimes | None = None) -> None:
    observer = None if times is None else (times.address, 0)
    model.start(n_ctx=ctx, n_seq=1, n_batch=BATCH, cache=CacheTypes("q8_0", "q8_0", kv), observer=observer)


def _fill(model: Model, kv: str, depth: int, ctx: int, state: Path) -> None:
    """Writes the state behind ``depth`` random tokens."""
    if state.is_file():
        return
    _start(model, kv, ctx)
    tokens = np.random.default_rng(0).integers(0, model.n_vocab, depth).astype(np.int32)
    with track(depth, f"{kv}, {depth}", "tokens") as advance:
        for at in range(0, depth, BATCH):
            part = tokens[at : at + BATCH]
            zeros = np.zeros(len(part), np.int32)
            model.decode(part, np.arange(at, at + len(part), dtype=np.int32), zeros, zeros.astype(np.bool_))
            advance(len(part))
    with atomic_path(state) as path:
        none = (model._api.llama_token * 1)()
        if not model._api.llama_state_seq_save_file(model._context, str(path).encode(), 0, none, 0):
            sys.exit(f"{state}: the state cannot be saved")


def _restore(model: Model, state: Path) -> None:
    api = model._api
    none, count = (api.llama_token * 1)(), api.ctypes.c_size_t()
    if not api.llama_state_seq_load_file(
        model._context, str(state).encode(), 0, none, 1, api.ctypes.byref(count)
    ):
        sys.exit(f"{state}: the state cannot be read; delete it")


def ratios(values: NDArray[np.float64]) -> dict[str, float]:
    """Median and a 95 % interval of it, from order statistics."""
    ordered, n = np.sort(values), len(values)
    below = math.floor(n / 2 - 1.96 * math.sqrt(n) / 2)
    return {
        "median": float(np.median(ordered)),
        "low": float(ordered[max(0, below)]),
        "high": float(ordered[min(n - 1, n - 1 - below)]),
    }


def measure(options: argparse.Namespace, depth: int) -> dict[str, Any]:
    """One row of the table."""
    shape = models.Model(models.SHAPES["1B"], options.layers, "FQ4")
    path = models.build(shape, options.out)
    ctx = -(-(depth + (options.rounds + 2) * options.tokens) // 256) * 256
    states = {
        kv: options.out / f"{depth}-{options.layers}-{kv.replace('/', '_')}.state"
        for kv in (WHOLE, options.kv)
    }
    times = {kv: NodeTimes() for kv in states}
    loaded = {kv: Model(path, threads=options.threads) for kv in states}
    for kv, model in loaded.items():
        _fill(model, kv, depth, ctx, states[kv])
    found: dict[str, dict[str, list[float]]] = {}
    for what in ("token", "attention"):
        contenders = {}
        for kv, model in loaded.items():
            _start(model, kv, ctx, times[kv] if what == "attention" else None)
            _restore(model, states[kv])
            contenders[kv] = Contender(model, depth)
            contenders[kv].generate(2)
        for number in range(options.rounds):
            for kv in sorted(states, reverse=bool(number % 2)):
                times[kv].clear()
                seconds = contenders[kv].generate(options.tokens)
                its = seconds if what == "token" else times[kv].seconds
                found.setdefault(what, {}).setdefault(kv, []).append(its / options.tokens)
    for model in loaded.values():
        model.close()
    weights, cache = shape.decode_bytes, options.layers * 8 * SLOT_BYTES * depth
    row: dict[str, Any] = {"depth": depth, "weights": weights, "cache": cache}
    for what, by_kv in found.items():
        whole, budget = (np.array(by_kv[kv]) for kv in (WHOLE, options.kv))
        row[what] = {"whole_ms": 1e3 * float(np.median(whole)), "times": ratios(whole / budget)}
    row["ideal"] = (weights + cache) / (weights + cache / 4)
    return row


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--depths", type=int, nargs="+", default=[8192, 65536])
    parser.add_argument("--kv", default="paged,25%,policy=attention")
    parser.add_argument("--layers", type=int, default=LAYERS["1B"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=16, help="of a round")
    parser.add_argument("-t", "--threads", type=int)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for depth in options.depths:
        row = measure(options, depth)
        rows.append(row)
        write_json(options.out / f"decode-{depth}.json", row)
        line = ", ".join(
            f"{what} {row[what]['times']['median']:.2f} times as fast "
            f"({row[what]['times']['low']:.2f} to {row[what]['times']['high']:.2f}; "
            f"whole {row[what]['whole_ms']:.2f} ms)"
            for what in ("attention", "token")
        )
        print(f"{depth}: {line}; by bytes a token {row['ideal']:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
