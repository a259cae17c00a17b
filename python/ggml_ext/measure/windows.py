"""Windows of a text: how they are decoded in bounded batches, and where what the base gave for them waits.

A window is ``ctx`` tokens; the predictions of its second half are scored, as in llama-perplexity.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.measure.scoring import BaseRows
from ggml_ext.runtime.llama import Model

BATCH_TOKENS = 2048
"""Tokens per decode, llama-perplexity's default; short windows share a batch as parallel sequences."""

OUTPUT_BYTES = 256 << 20
"""Bound on the logits of one decode: a vocabulary of 150k takes 0.6 MB per position."""

SCRATCH_BYTES = 2 << 30
"""Bound on what waits on disk; loading a model again costs little beside 2 GiB of logits."""


@dataclass(frozen=True)
class Plan:
    """How windows of ``ctx`` tokens are decoded: ``n_seq`` at a time, ``step`` tokens of each per decode."""

    ctx: int
    n_seq: int
    step: int

    @property
    def first(self) -> int:
        """Position of the first scored prediction in a window."""
        return self.ctx // 2

    @property
    def rows(self) -> int:
        """Scored positions per window; the last position predicts a token of the next window."""
        return self.ctx - 1 - self.first


def make_plan(ctx: int, n_vocab: int) -> Plan:
    """The largest batches that keep within BATCH_TOKENS and OUTPUT_BYTES."""
    cap = max(32, OUTPUT_BYTES // (4 * n_vocab))
    rows = ctx - 1 - ctx // 2
    if ctx <= BATCH_TOKENS and rows <= cap:
        return Plan(ctx, min(BATCH_TOKENS // ctx, cap // rows), ctx)
    return Plan(ctx, 1, min(BATCH_TOKENS, cap // 32 * 32))


def decode_windows(
    model: Model, windows: NDArray[np.int32], plan: Plan, start: int, stop: int
) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
    """Decode windows start..stop of ``windows`` [n, ctx].

    Yields (window, first row, logits [rows, n_vocab]) in order; a long window comes in several pieces. The
    logits are a view that the next step overwrites.
    """
    for at in range(start, stop, plan.n_seq):
        group = windows[at : min(at + plan.n_seq, stop)].copy()
        if model.bos is not None:
            group[:, 0] = model.bos
        model.clear()
        for begin in range(0, plan.ctx, plan.step):
            position = np.arange(begin, min(begin + plan.step, plan.ctx), dtype=np.int32)
            scored = (position >= plan.first) & (position < plan.ctx - 1)
            logits = model.decode(
                group[:, position].ravel(),
                np.tile(position, len(group)),
                np.repeat(np.arange(len(group), dtype=np.int32), len(position)),
                np.tile(scored, len(group)),
            )
            rows = int(np.count_nonzero(scored))
            if rows:
                row = max(begin, plan.first) - plan.first
                for i in range(len(group)):
                    yield at + i, row, logits[i * rows : (i + 1) * rows]


def _scratch_folder() -> Path:
    """$TMPDIR, else /var/tmp: unlike /tmp it is meant for large files and never lies in memory."""
    large = Path("/var/tmp")
    return Path(os.environ.get("TMPDIR") or (large if large.is_dir() else tempfile.gettempdir()))


class Scratch(AbstractContextManager["Scratch"]):
    """Float32 values [window, row, width] of one group of windows in a file without a name."""

    def __init__(self, rows: int, width: int, n_windows: int, what: str) -> None:
        """Room for ``n_windows``, or for as many as SCRATCH_BYTES and the free space allow: ``windows``.

        ``what``: the values' name in messages. Raises GgmlExtError if the folder for temporary files has no
        room for a single window.
        """
        self.folder = _scratch_folder()
        self._what = what
        self._row_bytes = 4 * width
        self._width = width
        self._window_bytes = rows * self._row_bytes
        try:
            budget = min(SCRATCH_BYTES, shutil.disk_usage(self.folder).free // 2)
            self.windows = min(n_windows, budget // self._window_bytes)
            if self.windows == 0:
                raise self._full(self._window_bytes)
            self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115  closed by __exit__
        except OSError as error:
            raise GgmlExtError(
                f"{self.folder}: {error.strerror}; set TMPDIR to a folder that can be written"
            ) from error
        self.bytes = self.windows * self._window_bytes

    def _full(self, needed: int) -> GgmlExtError:
        return GgmlExtError(
            f"{self.folder}: no room for {needed / 1e6:.0f} MB of {self._what}; set TMPDIR to another folder"
        )

    def write(self, slot: int, row: int, values: NDArray[np.float32]) -> None:
        """Store ``values`` as rows row... of window ``slot``."""
        data = np.ascontiguousarray(values).data.cast("B")
        offset = slot * self._window_bytes + row * self._row_bytes
        try:
            while data:
                written = os.pwrite(self._file.fileno(), data, offset)
                data, offset = data[written:], offset + written
        except OSError as error:
            raise self._full(self.bytes) from error

    def rows(self, slot: int, row: int) -> BaseRows:
        """Reader of the rows of window ``slot``, counted from ``row``; safe to call from several threads."""

        def read(start: int, stop: int) -> NDArray[np.float32]:
            offset = slot * self._window_bytes + (row + start) * self._row_bytes
            data = os.pread(self._file.fileno(), (stop - start) * self._row_bytes, offset)
            return np.frombuffer(data, np.float32).reshape(-1, self._width)

        return read

    def __exit__(self, *_: object) -> None:
        self._file.close()
