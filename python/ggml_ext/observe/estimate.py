"""ggml-ext observe --dry-run: what an observation will take. Nothing stays of what it does.

Memory is what llama.cpp itself says of its buffers. Time comes from the model: a batch on the text, once with
nothing but its last site observed, which is the forward pass, and once with as many sites as fit into a
bounded memory; the other sites' products are in proportion to their operations.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggml_ext import hf
from ggml_ext.atomic import work_folder
from ggml_ext.cpus import physical_cores
from ggml_ext.importance import read_text
from ggml_ext.llama import Model
from ggml_ext.observe.layout import FLOAT, block_floats, moment_floats
from ggml_ext.observe.observer import Observer, Target
from ggml_ext.observe.prepare import Prepared, Request, Warn, prepare
from ggml_ext.observe.run import COMMIT_SECONDS, named_as
from ggml_ext.outputs import check_folder
from ggml_ext.owned_folder import SOURCE
from ggml_ext.source import Source, open_gguf

_SUMS_BYTES = 512 << 20  # of the sites that are timed
_SECONDS = 60.0  # of a timed batch, about
_PROBE_BYTES = 64 << 20  # of the disk's rate
_BLOCK = re.compile(r"blk\.\d+\.")


@dataclass(frozen=True)
class Sizes:
    """What solving and rounding the observed matrices depend on. ``widest``: channels of a site.
    ``squares``: sum of n^2 over the sites. ``weights``: of all matrices, ``block``: of those of the largest
    block."""

    widest: int
    squares: int
    weights: int
    block: int


@dataclass(frozen=True)
class Estimate:
    """``memory``: bytes that the process takes beside mapped files; ``mapped``: of the model's files, which
    are read again for every batch where memory cannot keep them. ``disk``: what -> bytes, all at once.
    ``free``: bytes free there. ``seconds``: of the command. ``forward``: of the windows without sums."""

    folder: Path
    sites: int
    windows: int
    ctx: int
    batch: int
    memory: int
    mapped: int
    disk: dict[str, int]
    free: int
    seconds: float
    forward: float
    sizes: Sizes

    def lines(self) -> list[str]:
        """The figures in a few lines."""
        needed = sum(self.disk.values())
        room = "" if needed <= self.free else f", of which only {_size(self.free)} are free: make room first"
        disk = ", ".join(f"{what} {_size(n_bytes)}" for what, n_bytes in self.disk.items())
        tokens = self.windows * self.ctx
        return [
            f"sites   {self.sites}, on {self.windows} windows of {self.ctx} tokens, {self.batch} at a time",
            f"memory  {_size(self.memory)}, and the model's {_size(self.mapped)} mapped",
            f"disk    {_size(needed)}{room}: {disk}",
            f"time    {_duration(self.seconds)} at {tokens / self.seconds:,.4g} tok/s; "
            f"{self.seconds / self.forward:.2f} times the forward pass",
            f"{self.folder}: nothing was written",
        ]

    def as_json(self) -> dict[str, Any]:
        """The figures for --json."""
        return {**asdict(self), "folder": str(self.folder)}


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def estimate(request: Request, folder: Path, *, warn: Warn) -> Estimate:
    """Estimates the observation of ``request`` into ``folder``.

    A Hugging Face folder is converted for it, into a temporary file on the disk of ``folder``. Raises
    GgmlExtError as the observation itself would.
    """
    hf.require(request.source)
    check_folder(folder, [request.source, request.text])
    content = read_text(request.text)
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    with _float_model(request, folder, existing) as model, named_as(model, request.source):
        started = time.monotonic()
        prepared = prepare(request, model, content, warn)
        preparing, before = time.monotonic() - started, _anonymous()
        timed = _time(prepared, request.threads or physical_cores())
        source = open_gguf(model)
        mapped = sum(path.stat().st_size for path in source.files)
    disk = {"two generations of sums": 2 * prepared.layout.sums_bytes}
    disk["samples"] = prepared.layout.sample_bytes + prepared.layout.absmax_bytes
    if request.source.is_dir():
        disk[SOURCE] = mapped
    status = os.statvfs(existing)
    batches = -(-len(prepared.tokens) // prepared.n_seq)
    commits = min(batches, 1 + int(timed.all / COMMIT_SECONDS))
    flushing = commits * prepared.layout.sums_bytes * _seconds_per_byte(existing, prepared.layout.sums_bytes)
    return Estimate(
        folder,
        len(prepared.table.sites),
        len(prepared.tokens),
        request.ctx,
        prepared.n_seq * request.ctx,
        before + prepared.memory,
        mapped,
        disk,
        status.f_bavail * status.f_frsize,
        preparing + timed.all + flushing,
        timed.forward,
        _sizes(prepared, source),
    )


def _sizes(prepared: Prepared, source: Source) -> Sizes:
    weights = {tensor.name: tensor.n_weights for tensor in source.tensors}
    blocks: Counter[str] = Counter()
    for site in prepared.table.sites:
        for reader in site.readers:
            block = _BLOCK.match(reader.tensor)
            blocks[block[0] if block else ""] += weights.get(reader.tensor, 0)
    return Sizes(
        widest=prepared.table.widest,
        squares=sum(site.n**2 for site in prepared.table.sites),
        weights=blocks.total(),
        block=max(blocks.values()),
    )


@contextmanager
def _float_model(request: Request, folder: Path, existing: Path) -> Iterator[Path]:
    if not request.source.is_dir():
        yield request.source
    elif (folder / SOURCE).is_file():
        yield folder / SOURCE
    else:
        with work_folder(existing / (folder.name or "observation")) as work:
            path = work / SOURCE
            with named_as(path, request.source):
                hf.to_gguf(request.source, path, trust_remote_code=request.trust_remote_code)
            yield path


@dataclass(frozen=True)
class _Seconds:
    """Of all windows: with all sites, and without sums."""

    all: float
    forward: float


def _time(prepared: Prepared, threads: int) -> _Seconds:
    """Decodes a window to get the model into memory, then _SECONDS of windows, without and with sums."""
    chosen = _chosen(prepared)
    costs = _costs(prepared)
    last = len(costs) - 1
    with Observer(threads) as observer, Model(prepared.model, threads=threads) as model:
        observer.start(model, ctx=prepared.tokens.shape[1], n_seq=prepared.n_seq)
        only = _targets(prepared, [last])
        some = _targets(prepared, [*chosen, last])

        def seconds(targets: list[Target], n_windows: int) -> float:
            observer.aim(targets)
            started = time.monotonic()
            observer.decode(model, prepared.tokens[:n_windows], 0)
            return time.monotonic() - started

        seconds(some, 1)
        n = int(max(1, min(prepared.n_seq, _SECONDS / seconds(some, 1))))
        forward, observed = seconds(only, n), seconds(some, n)
    timed = sum(costs[i] for i in {*chosen, last} - {last})
    sums = max(0.0, observed - forward) * (sum(costs) - costs[last]) / timed if timed else 0.0
    scale = len(prepared.tokens) / n
    return _Seconds(scale * (forward + sums), scale * forward)


def _costs(prepared: Prepared) -> list[float]:
    """Operations of each site's sums per token, in floats added."""
    costs = []
    for site, place in zip(prepared.table.sites, prepared.layout.places, strict=True):
        moments = 2 if place.own_moments else 1
        costs.append(float(place.rows * (moments * moment_floats(site.n) + (site.n if site.experts else 0))))
    return costs


def _chosen(prepared: Prepared) -> list[int]:
    """Sites to be timed: one of each form first, then others, as far as their sums fit into _SUMS_BYTES."""
    sites, places = prepared.table.sites, prepared.layout.places
    size = [FLOAT * block_floats(s, p.own_moments) for s, p in zip(sites, places, strict=True)]
    firsts = {(s.n, s.experts, p.own_moments): i for i, (s, p) in enumerate(zip(sites, places, strict=True))}
    order = sorted(range(len(sites)), key=lambda i: (i not in firsts.values(), size[i]))
    chosen: list[int] = []
    used = 0
    for i in order:
        if not chosen or used + size[i] <= _SUMS_BYTES:
            chosen.append(i)
            used += size[i]
    return chosen


def _targets(prepared: Prepared, chosen: list[int]) -> list[Target]:
    targets = []
    for i, (site, place) in enumerate(zip(prepared.table.sites, prepared.layout.places, strict=True)):
        after: NDArray[np.float32] | None = None
        if i in chosen:
            after = np.zeros(block_floats(site, place.own_moments), np.float32)
        targets.append(Target(after, after, own_moments=place.own_moments))
    return targets


def _anonymous() -> int:
    """Bytes of this process that are no mapped file; 0 where the system does not say."""
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) << 10
    return 0


def _seconds_per_byte(folder: Path, n_bytes: int) -> float:
    """Of writing to the folder's disk, by a file without a name; 0 for few bytes and where it cannot be."""
    if n_bytes < _PROBE_BYTES:
        return 0.0
    with suppress(OSError), ExitStack() as stack:
        file = stack.enter_context(tempfile.TemporaryFile(dir=folder))
        started = time.monotonic()
        file.write(os.urandom(1 << 20) * (_PROBE_BYTES >> 20))
        file.flush()
        os.fsync(file.fileno())
        return (time.monotonic() - started) / _PROBE_BYTES
    return 0.0
