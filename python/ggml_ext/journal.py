"""Scores of an unfinished evaluation, kept on disk so that the same command goes on where it stopped.

A journal is a folder of append-only files, one per model, each a sequence of scored windows: the dtype
``scoring.SCORE``, ``rows`` records per window. A torn last window (power failure) is dropped on reading.
The folder's name is a digest of everything the scores depend on; a finished run removes its files.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ggml_ext.scoring import SCORE
from ggml_ext.upstream import cache_dir

KEEP_DAYS = 14
"""Journals of runs that nobody finished are removed after this time."""


def cache_root() -> Path:
    """Folder of the journals."""
    return cache_dir() / "evaluate"


def identity(path: Path) -> list[Any]:
    """What tells one version of a file from another without reading it: real path, size, time of change."""
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def digest(facts: Any) -> str:
    """Short digest of a JSON value."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


class Journal:
    """Scores per model, in memory and, as far as the disk allows, in a folder. Use it in ``with``.

    Leaving the block keeps the scores; ``finish`` removes them. Without a usable folder (read-only, full, in
    use by another run) the evaluation goes on and only cannot be resumed; one line on stderr says so.
    """

    def __init__(self, facts: dict[str, Any], rows: int) -> None:
        """``facts``: everything that the base's scores depend on. ``rows``: scored positions per window."""
        self._window_bytes = rows * SCORE.itemsize
        self._rows = rows
        self._scores: dict[str, list[NDArray[np.void]]] = {}
        self._lock: IO[str] | None = None
        self._folder: Path | None = None
        try:
            self._folder = cache_root() / digest(facts)
            self._prune()
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / "facts.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
            self._lock = (self._folder / "lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._give_up(error)

    def _prune(self) -> None:
        if cache_root().is_dir():
            for folder in cache_root().iterdir():
                if time.time() - folder.stat().st_mtime > KEEP_DAYS * 86400:
                    shutil.rmtree(folder, ignore_errors=True)

    def _give_up(self, error: OSError) -> None:
        reason = "another run is using it" if isinstance(error, BlockingIOError) else error.strerror
        where = self._folder or error.filename
        print(f"ggml-ext: {where}: {reason}; this run cannot be resumed", file=sys.stderr)
        self._folder = None

    def _file(self, facts: Any) -> Path | None:
        return None if self._folder is None else self._folder / f"{digest(facts)}.scores"

    def _load(self, facts: Any) -> list[NDArray[np.void]]:
        file = self._file(facts)
        if file is None or not file.exists():
            return []
        data = file.read_bytes()
        whole = len(data) // self._window_bytes
        if len(data) % self._window_bytes:
            os.truncate(file, whole * self._window_bytes)
        records = np.frombuffer(data, SCORE, whole * self._rows)
        return list(records.reshape(whole, self._rows))

    def windows(self, facts: Any) -> list[NDArray[np.void]]:
        """Scored windows, each [rows], of the model that ``facts`` identify, from the first one on."""
        key = digest(facts)
        if key not in self._scores:
            try:
                self._scores[key] = self._load(facts)
            except OSError as error:
                self._scores[key] = []
                self._give_up(error)
        return self._scores[key]

    def append(self, facts: Any, scores: NDArray[np.void]) -> None:
        """Add the next window's ``scores`` [rows]."""
        self.windows(facts).append(scores)
        file = self._file(facts)
        if file is not None:
            try:
                with file.open("ab") as out:
                    out.write(scores.tobytes())
            except OSError as error:
                self._give_up(error)

    def finish(self) -> None:
        """Remove the scores that this run has used: its results have been delivered."""
        if self._folder is not None:
            for key in self._scores:
                (self._folder / f"{key}.scores").unlink(missing_ok=True)
            if not list(self._folder.glob("*.scores")):
                shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.close()
