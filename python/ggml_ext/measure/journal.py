"""Scores of an unfinished evaluation, kept on disk so that the same command goes on where it stopped.

A journal is a folder of append-only files, one per model, each a sequence of scored windows: ``rows``
records of one dtype (``scoring.SCORE``, or another measurement's) per window, then a checksum of 16 bytes.
What a power failure has torn or filled with zeros is dropped on reading, and so is what two runs have written
at once. The folder's name is a digest of everything the scores depend on; a finished run removes its files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ggml_ext.core import owner, paths
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.files import cache_dir, digest
from ggml_ext.core.outputs import identity
from ggml_ext.measure.scoring import SCORE

KEEP_DAYS = 14
"""Journals of runs that nobody finished are removed after this time."""

_FOLDER = re.compile(r"[0-9a-f]{32}")
_CHECK_BYTES = 16
_SYNC_SECONDS = 1.0  # between two flushes to the disk, which take longer than the windows of a small model


def cache_root() -> Path:
    """Folder of the journals. Raises GgmlExtError if there is no place for a cache."""
    return cache_dir() / "evaluate"


def _software() -> dict[str, Any]:
    """The libraries that give scores, and the variables that they heed."""
    libraries = sorted(path for path in paths.lib_dir().glob("lib*") if path.suffix in (".so", ".dylib"))
    return {
        "libraries": [identity(library) for library in libraries],
        "switches": {k: v for k, v in sorted(os.environ.items()) if k.startswith(("GGML_EXT_", "LLAMA_"))},
    }


class Journal:
    """Scores per model, in memory and, as far as the disk allows, in a folder. Use it in ``with``.

    Leaving the block keeps the scores; ``finish`` removes them. Without a usable folder (read-only, full, in
    use by another run) the evaluation goes on and only cannot be resumed; one line on stderr says so.
    """

    def __init__(self, facts: dict[str, Any], rows: int, record: np.dtype[Any] = SCORE) -> None:
        """``facts``: everything that the base's scores depend on, but the software. ``rows``: scored
        positions per window, each a ``record``."""
        facts = {**facts, **_software()}
        self._record = record
        self._window_bytes = rows * record.itemsize
        self._rows = rows
        self._scores: dict[str, list[NDArray[np.void]]] = {}
        self._lock: IO[str] | None = None
        self._folder: Path | None = None
        self._synced = time.monotonic()
        try:
            root = cache_root()
            _prune(root)
            self._folder = root / digest(facts)
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / "facts.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
            self._lock = (self._folder / "lock").open("w")
            owner.lock(self._lock)
        except BlockingIOError:
            self._give_up(f"{self._folder}: another run is using it")
        except OSError as error:
            self._give_up(f"{self._folder}: {error.strerror}")
        except GgmlExtError as error:
            self._give_up(str(error))

    def _give_up(self, reason: str) -> None:
        print(f"ggml-ext: {reason}; this run cannot be resumed", file=sys.stderr)
        self._folder = None

    def _file(self, facts: Any) -> Path | None:
        return None if self._folder is None else self._folder / f"{digest(facts)}.scores"

    def _check(self, key: str, index: int, data: bytes) -> bytes:
        """The checksum of window ``index`` of the model with digest ``key``."""
        return hashlib.blake2b(data, digest_size=_CHECK_BYTES, key=f"{key} {index}".encode()).digest()

    def _load(self, facts: Any) -> list[NDArray[np.void]]:
        file = self._file(facts)
        if file is None or not file.exists():
            return []
        data, step = file.read_bytes(), self._window_bytes + _CHECK_BYTES
        windows: list[NDArray[np.void]] = []
        for start in range(0, len(data), step):
            window, check = np.split(np.frombuffer(data[start : start + step], "u1"), [self._window_bytes])
            if check.tobytes() != self._check(digest(facts), len(windows), window.tobytes()):
                os.truncate(file, start)
                break
            windows.append(window.view(self._record))
        return windows

    def windows(self, facts: Any) -> list[NDArray[np.void]]:
        """Scored windows, each [rows], of the model that ``facts`` identify, from the first one on."""
        key = digest(facts)
        if key not in self._scores:
            try:
                self._scores[key] = self._load(facts)
            except OSError as error:
                self._scores[key] = []
                self._give_up(f"{self._folder}: {error.strerror}")
        return self._scores[key]

    def append(self, facts: Any, scores: NDArray[np.void]) -> None:
        """Add the next window's ``scores`` [rows]."""
        windows = self.windows(facts)
        windows.append(scores)
        file, data = self._file(facts), scores.tobytes()
        if file is not None:
            try:
                with file.open("ab") as out:
                    out.write(data + self._check(digest(facts), len(windows) - 1, data))
                    if time.monotonic() - self._synced > _SYNC_SECONDS:
                        out.flush()
                        os.fsync(out.fileno())
                        self._synced = time.monotonic()
            except OSError as error:
                self._give_up(f"{self._folder}: {error.strerror}")

    def finish(self) -> None:
        """Remove the scores that this run has used: its results have been delivered."""
        if self._folder is not None:
            with suppress(OSError):
                for key in self._scores:
                    (self._folder / f"{key}.scores").unlink(missing_ok=True)
                if not list(self._folder.glob("*.scores")):
                    _discard(self._folder)
            self._folder = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.close()


def _prune(root: Path) -> None:
    """Removes the journals below ``root`` that nobody has written to for KEEP_DAYS; what is none stays."""
    if not root.is_dir():
        return
    for folder in root.iterdir():
        with suppress(OSError):
            if _FOLDER.fullmatch(folder.name) and time.time() - _last_change(folder) > KEEP_DAYS * 86400:
                with (folder / "lock").open("a") as lock:
                    owner.lock(lock)
                    _discard(folder)


def _last_change(folder: Path) -> float:
    return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))


def _own_files(folder: Path) -> Iterator[Path]:
    yield from folder.glob("*.scores")
    yield from (folder / "facts.json", folder / "lock")


def _discard(folder: Path) -> None:
    """Removes a journal, but for files that are none of its own."""
    for path in _own_files(folder):
        path.unlink(missing_ok=True)
    folder.rmdir()
