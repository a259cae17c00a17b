"""The growing files of an observation: sums in two generations, largest values, kept rows, and the state.

Sums are added batch by batch, from the file of the last generation into the other one. The state names the
file that is whole; it is replaced only after the other has reached the disk, so a kill at any moment costs
the batches since then. Largest values and kept rows do not change when a batch is repeated: one file each.
"""

from __future__ import annotations

import errno
import mmap
import os
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.observe.layout import FLOAT, Layout, block_floats
from ggml_ext.observe.observer import Target
from ggml_ext.observe.sites import Table
from ggml_ext.observe.state import ABSMAX, SAMPLES, State, load_state, save_state

_NO_ALLOCATION = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS, errno.ENODEV)

Floats = NDArray[np.float32]


class _Mapped:
    """A file of fixed size in memory, as float32; what was never written is 0. No file for no bytes."""

    def __init__(self, path: Path, n_bytes: int, stack: ExitStack, *, there: bool) -> None:
        """there: the file exists and holds figures that count."""
        self.floats: Floats = np.empty(0, np.float32)
        self._map: mmap.mmap | None = None
        if not n_bytes:
            return
        self._handle = os.open(path, os.O_RDWR | (0 if there else os.O_CREAT), 0o666)
        stack.callback(os.close, self._handle)
        if os.fstat(self._handle).st_size != n_bytes:
            if there:
                raise GgmlExtError(f"{path}: damaged (size); delete the folder and observe again")
            os.truncate(self._handle, 0)
        _allocate(self._handle, n_bytes, path)
        # Not closed by us: numpy's arrays and llama.cpp may still point into it; it ends with the last one.
        self._map = mmap.mmap(self._handle, n_bytes)
        self.floats = np.frombuffer(self._map, np.float32)

    def flush(self) -> None:
        """Returns when all of it is on the disk."""
        if self._map is not None:
            self._map.flush()
            os.fsync(self._handle)


def _allocate(handle: int, n_bytes: int, path: Path) -> None:
    """Sets the size, and where the file system can, takes the room: a disk that fills up while a mapped file
    is written ends the process without a word."""
    os.truncate(handle, n_bytes)
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(handle, 0, n_bytes)
    except OSError as exc:
        if exc.errno not in _NO_ALLOCATION:
            raise GgmlExtError(
                f"{path}: no room for {n_bytes / 1e9:.2f} GB ({exc.strerror}); make room, or observe into a "
                "folder on another disk"
            ) from exc


class Store:
    """The files, opened for adding to. Use it in ``with``, around everything that writes to its targets."""

    def __init__(self, folder: Path, table: Table, layout: Layout) -> None:
        """Raises GgmlExtError where the disk has no room or the state is damaged."""
        self.state = load_state(folder)
        self._folder, self._table, self._layout = folder, table, layout
        self._stack = ExitStack()
        self._generations: dict[str, _Mapped] = {}
        self._before: _Mapped | None = None
        self._after: _Mapped | None = None

    def __enter__(self) -> Store:
        with self._stack:
            there, layout = bool(self.state.sums), self._layout
            self._absmax = _Mapped(self._folder / ABSMAX, layout.absmax_bytes, self._stack, there=there)
            self._sample = _Mapped(self._folder / SAMPLES, layout.sample_bytes, self._stack, there=there)
            if there:
                self._before = self._sums(self.state.sums, there=True)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _sums(self, name: str, *, there: bool) -> _Mapped:
        if name not in self._generations:
            path, n_bytes = self._folder / name, self._layout.sums_bytes
            self._generations[name] = _Mapped(path, n_bytes, self._stack, there=there)
        return self._generations[name]

    def targets(self) -> list[Target]:
        """Where the next batch goes, site by site."""
        if self._after is None:
            self._after = self._sums(self.state.next_sums, there=False)
        before, after, rows = self._before, self._after, self._layout.sample_bytes > 0
        targets = []
        for site, place in zip(self._table.sites, self._layout.places, strict=True):
            floats = block_floats(site, place.moments)
            targets.append(
                Target(
                    before=None if before is None else _part(before, place.sums, floats),
                    after=_part(after, place.sums, floats),
                    absmax=_part(self._absmax, place.absmax, site.n) if rows else None,
                    sample=_part(self._sample, place.sample, place.sample_rows * site.n) if rows else None,
                    stride=place.stride,
                    moments=place.moments,
                )
            )
        return targets

    def added(self) -> None:
        """The batch is in the sums: the next one adds to them in place."""
        self._before = self._after

    def commit(self, windows: int) -> None:
        """Makes the sums so far, of ``windows`` windows, those that a later run goes on with."""
        assert self._after is not None
        assert self._before is self._after
        for file in (self._after, self._absmax, self._sample):
            file.flush()
        self.state = State(windows, self.state.next_sums)
        save_state(self._folder, self.state)
        self._after = None


def _part(file: _Mapped, offset: int, floats: int) -> Floats:
    return file.floats[offset // FLOAT : offset // FLOAT + floats]
