"""ggml-ext observe --dry-run: what an observation will take. Nothing stays of what it does.

Memory is what llama.cpp itself says of its buffers. Time comes from the model: batches of the text, or as
much of one as takes a minute, with all sites observed, and one with the last alone, which is the forward
pass. What comes before the batches is timed too, and the disk.
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

from ggml_ext.core.atomic import work_folder
from ggml_ext.core.cpus import threads_or_cores
from ggml_ext.core.errors import Warn
from ggml_ext.core.outputs import check_folder
from ggml_ext.core.owned_folder import SOURCE
from ggml_ext.core.progress import duration_text, size_text
from ggml_ext.gguf.source import Source, open_gguf
from ggml_ext.hf import folder as hf
from ggml_ext.observe.layout import Place, block_floats
from ggml_ext.observe.observer import Observer, Target
from ggml_ext.observe.prepare import Prepared, Request, prepare
from ggml_ext.observe.run import COMMIT_SECONDS, named_as
from ggml_ext.observe.samples import read_text
from ggml_ext.observe.sites import Table
from ggml_ext.runtime.llama import Model

_SUMS_BYTES = 512 << 20  # of the sites that are timed
_SECONDS = 60.0  # of a timed batch, about
_STEADY_SECONDS = 15.0  # of timed batches, where the observation itself takes four times as long
_PROBE_BYTES = 64 << 20  # of the disk's rate
_BLOCK = re.compile(r"blk\.\d+\.")


@dataclass(frozen=True)
class Sizes:
    """What solving and rounding the observed matrices depend on. ``widest``: channels of a site. ``squares``:
    sum of n^2 over the sites. ``matrices``: how many read them. ``weights``: of all matrices, ``block``: of
    those of the largest block, ``outside``: of those in none."""

    widest: int
    sites: int
    squares: int
    matrices: int
    weights: int
    block: int
    outside: int


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
        room = (
            "" if needed <= self.free else f", of which only {size_text(self.free)} are free: make room first"
        )
        disk = ", ".join(f"{what} {size_text(n_bytes)}" for what, n_bytes in self.disk.items())
        tokens = self.windows * self.ctx
        return [
            f"sites   {self.sites}, on {self.windows} windows of {self.ctx} tokens, {self.batch} at a time",
            f"memory  {size_text(self.memory)}, and the model's {size_text(self.mapped)} mapped",
            f"disk    {size_text(needed)}{room}: {disk}",
            f"time    {duration_text(self.seconds)} at {tokens / self.seconds:,.4g} tok/s; "
            f"{self.seconds / self.forward:.2f} times the forward pass",
            f"{self.folder}: nothing was written",
        ]

    def as_json(self) -> dict[str, Any]:
        """The figures for --json."""
        return {**asdict(self), "folder": str(self.folder)}


def estimate(request: Request, folder: Path, *, warn: Warn) -> Estimate:
    """Estimates the observation of ``request`` into ``folder``.

    A Hugging Face folder is converted for it, into a temporary file on the disk of ``folder``. Raises
    GgmlExtError as the observation itself would.
    """
    hf.require(request.source)
    check_folder(folder, [request.source, request.text])
    content = read_text(request.text)
    existing = _existing(folder)
    started = time.monotonic()
    with _float_model(request, folder, existing) as model, named_as(model, request.source):
        prepared = prepare(request, model, content, warn)
        preparing, before = time.monotonic() - started, _anonymous()
        timed = _time(prepared, threads_or_cores(request.threads))
        source = open_gguf(model)
        mapped = sum(path.stat().st_size for path in source.files)
    disk = {"two generations of sums": 2 * prepared.layout.sums_bytes}
    disk["samples"] = prepared.layout.sample_bytes + prepared.layout.absmax_bytes
    if request.source.is_dir():
        disk[SOURCE] = mapped
    batches = -(-len(prepared.tokens) // prepared.n_seq)
    commits = min(batches, 1 + int(timed.all / COMMIT_SECONDS))
    written = commits * prepared.layout.sums_bytes + disk["samples"]
    writing = written * _seconds_per_byte(existing, written)
    return Estimate(
        folder,
        len(prepared.table.sites),
        len(prepared.tokens),
        request.ctx,
        prepared.n_seq * request.ctx,
        before + prepared.memory,
        mapped,
        disk,
        free_bytes(folder),
        preparing + timed.loading + timed.all + writing,
        timed.forward,
        sizes_of(prepared.table, source),
    )


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk where the folder is or would be."""
    status = os.statvfs(_existing(folder))
    return status.f_bavail * status.f_frsize


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())


def sizes_of(table: Table, source: Source) -> Sizes:
    """Of the matrices of ``source`` that read a site."""
    weights = {tensor.name: tensor.n_weights for tensor in source.tensors}
    blocks: Counter[str] = Counter()
    for site in table.sites:
        for reader in site.readers:
            block = _BLOCK.match(reader.tensor)
            blocks[block[0] if block else ""] += weights.get(reader.tensor, 0)
    return Sizes(
        widest=table.widest,
        sites=len(table.sites),
        squares=sum(site.n**2 for site in table.sites),
        matrices=sum(len(site.readers) for site in table.sites),
        weights=blocks.total(),
        block=max((n for block, n in blocks.items() if block), default=0),
        outside=blocks[""],
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
    """``loading``: the model. ``all``, ``forward``: of all windows, with all sites and without sums."""

    loading: float
    all: float
    forward: float


def _time(prepared: Prepared, threads: int) -> _Seconds:
    """Decodes a window to get the model into memory, then as many as take _SECONDS, without and with sums."""
    began = time.monotonic()
    with Observer(threads) as observer, Model(prepared.model, threads=threads) as model:
        observer.start(model, ctx=prepared.tokens.shape[1], n_seq=prepared.n_seq)
        loading = time.monotonic() - began
        every = _targets(prepared)
        last = [*[Target(None, None)] * (len(every) - 1), every[-1]]

        def seconds(targets: list[Target], n_windows: int) -> float:
            observer.aim(targets)
            started = time.monotonic()
            observer.decode(model, prepared.tokens[:n_windows], 0, prepared.description.largest)
            return time.monotonic() - started

        one = seconds(every, 1)
        if one < _SECONDS:  # much of which was reading the model
            one = seconds(every, 1)
        n = int(max(1, min(prepared.n_seq, _SECONDS / one)))
        scale = len(prepared.tokens) / n
        forward, observed = seconds(last, n), [seconds(every, n)]
        while sum(observed) < min(_STEADY_SECONDS, scale * observed[0] / 4):
            observed.append(seconds(every, n))
    mean = sum(observed) / len(observed)
    return _Seconds(loading, scale * mean, scale * min(forward, mean))


def _targets(prepared: Prepared) -> list[Target]:
    """A target per site. Sites of one form share sums as far as _SUMS_BYTES makes them, and all sites share
    the rest: what becomes of the figures does not matter, and making them takes the same time."""
    pairs = list(zip(prepared.table.sites, prepared.layout.places, strict=True))
    forms = [(site.n, site.experts, place.moments) for site, place in pairs]
    kept = min(1.0, _SUMS_BYTES / prepared.layout.sums_bytes)
    shared: dict[tuple[int, int, int], list[NDArray[np.float32]]] = {form: [] for form in forms}
    most = max((_sampled(prepared, place) * site.n for site, place in pairs), default=0)
    sample, absmax = np.zeros(most, np.float32), np.zeros(prepared.table.widest, np.float32)
    targets: list[Target] = []
    for form, (site, place) in zip(forms, pairs, strict=True):
        if len(shared[form]) < max(1, int(kept * forms.count(form))):
            shared[form].append(np.zeros(block_floats(site, place.moments), np.float32))
        sums = shared[form][len(targets) % len(shared[form])]
        rows = _sampled(prepared, place)
        targets.append(
            Target(
                sums,
                sums,
                absmax=absmax[: site.n] if rows else None,
                sample=sample[: rows * site.n] if rows else None,
                stride=place.stride,
                moments=place.moments,
            )
        )
    return targets


def _sampled(prepared: Prepared, place: Place) -> int:
    """Rows of a batch that are kept."""
    tokens = prepared.description.batch
    return min(place.sample_rows, -(-tokens * place.rows // place.stride))


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
