"""A folder that a long command fills: whose it is, one run at a time, and what may be removed from it.

The file ``lock`` says who made the folder and for what. A folder that holds other files is refused. Without a
plan.json a folder was only begun: then nothing but the lock may be in it, and the source.gguf that the lock
knows by its inode.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, TypeVar

from ggml_ext.core import owner
from ggml_ext.core.atomic import sweep
from ggml_ext.core.errors import GgmlExtError

T = TypeVar("T")

LOCK = "lock"
PLAN = "plan.json"
SOURCE = "source.gguf"
_MAX_LOCK = 8192


class BusyError(GgmlExtError):
    """Another run holds the folder."""


@dataclass(frozen=True)
class Kind:
    """What a folder is for. ``name``: as the lock and messages have it. ``is_plan``: whether the folder's
    plan.json is one of this kind and version. ``made``: the files of a planned folder beside PLAN, SOURCE and
    LOCK, whether they are there or not."""

    name: str
    is_plan: Callable[[Path], bool]
    made: Callable[[Path], Iterable[Path]]


@dataclass(frozen=True)
class _Facts:
    """What the lock says. ``inode``: its own, so that a copied folder does not pass for ours. ``temporary``:
    convert made the folder and removes it with the output's last byte. ``created``: there was no folder
    before. ``source``: inode of source.gguf, 0 before it is made."""

    owner: owner.Owner
    inode: int
    temporary: bool
    created: bool
    source: int = 0


def load_plan(folder: Path, parse: Callable[[dict[str, Any]], T], remedy: str) -> T | None:
    """What ``parse`` makes of the folder's plan.json, None where there is none.

    Raises GgmlExtError, which ends with the remedy, where ``parse`` raises ValueError and for what is
    no JSON object.
    """
    path = folder / PLAN
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(facts, dict):
            raise ValueError("no JSON object")
        return parse(facts)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise GgmlExtError(f"{path}: {exc.strerror}; check its permissions") from exc
    except (ValueError, RecursionError) as exc:
        raise GgmlExtError(
            f"{path}: not a plan of this version ({exc}); delete the folder and {remedy}"
        ) from exc


class Held:
    """A folder that this run holds."""

    def __init__(self, folder: Path, kind: Kind, file: IO[bytes], facts: _Facts) -> None:
        self.folder = folder
        self._kind = kind
        self._file = file
        self._facts = facts
        self._write()

    def note_source(self, made: Path) -> None:
        """Remembers that ``made``, which becomes source.gguf, is ours."""
        self._facts = replace(self._facts, source=made.stat().st_ino)
        self._write()

    def _write(self) -> None:
        text = json.dumps({"ggml-ext": self._kind.name, **asdict(self._facts)}).encode()
        self._file.seek(0)
        self._file.write(text)
        self._file.truncate()
        with suppress(OSError):
            os.fsync(self._file.fileno())

    def drop_unplanned(self) -> None:
        """Removes what was made before there was a plan: there is nothing to go on with."""
        if (self.folder / PLAN).exists():
            return
        source = self.folder / SOURCE
        if source.exists() and source.stat().st_ino == self._facts.source:
            source.unlink()
        (self.folder / LOCK).unlink(missing_ok=True)
        self._remove_folder()

    @property
    def disposable(self) -> bool:
        """Whether convert made the folder, with a plan in it."""
        return self._facts.temporary and self._kind.is_plan(self.folder)

    def discard(self) -> None:
        """Removes the folder if it is disposable. Files that are none of its kind's stay."""
        if not self.disposable:
            return
        names = (self.folder / name for name in (SOURCE, PLAN, LOCK))
        for path in (*self._kind.made(self.folder), *names):  # what says whose folder it is goes last
            path.unlink(missing_ok=True)
        self._remove_folder()

    def _remove_folder(self) -> None:
        if self._facts.created:
            with suppress(OSError):  # it holds files of the user's
                self.folder.rmdir()


@contextmanager
def held(folder: Path, kind: Kind, *, temporary: bool) -> Iterator[Held]:
    """The folder, made if need be, for this process alone; what killed runs left in it is removed.

    temporary: convert makes it, for the length of a conversion. If the block fails before there is a plan,
    what it has made is removed. Raises GgmlExtError for a folder that is of no such kind, and for one that
    another run is using.
    """
    created = not folder.exists()
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            sweep(folder)
            before = _read_lock(folder / LOCK, kind)
            if before is not None:  # whoever holds it has files in there that are not finished
                file = stack.enter_context(_open_lock(folder, before))
            _require_ours(folder, kind, before)
            if before is None:
                file = stack.enter_context(_open_lock(folder, before))
        except OSError as exc:
            if created:
                with suppress(OSError):
                    folder.rmdir()
            raise GgmlExtError(f"{folder}: {exc.strerror}; choose another folder") from exc
        inode, planned = os.fstat(file.fileno()).st_ino, (folder / PLAN).exists()
        facts = _Facts(owner.current(), inode, temporary and not planned, created)
        if before is not None:
            kept = temporary and before.temporary and before.inode == inode
            facts = replace(before, owner=owner.current(), inode=inode, temporary=kept)
        mine = Held(folder, kind, file, facts)
        try:
            yield mine
        except BaseException:
            with suppress(OSError):
                mine.drop_unplanned()
            raise


def _open_lock(folder: Path, before: _Facts | None) -> IO[bytes]:
    """The lock, held. Raises GgmlExtError if another run holds it."""
    file = os.fdopen(os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666), "r+b", 0)
    try:
        busy = not owner.lock(file) and before is not None and _runs_elsewhere(before.owner)
    except BlockingIOError:
        busy = True
    if busy:
        file.close()
        raise BusyError(f"{folder}: another run is using it; wait for it or stop it")
    return file


def _runs_elsewhere(other: owner.Owner) -> bool:
    return other != owner.current() and owner.lives(other) is True


def _require_ours(folder: Path, kind: Kind, facts: _Facts | None) -> None:
    """Raises GgmlExtError unless the folder is empty or of the kind. ``facts``: what its lock says."""
    if (folder / PLAN).exists():
        if facts is None and not kind.is_plan(folder):  # a plan tells, if a power failure cost the lock
            raise _foreign(folder, kind, folder / PLAN)
        return
    for path in sorted(folder.iterdir()):
        lock = path.name == LOCK and (facts is not None or not _size(path))
        made = path.name == SOURCE and facts is not None and path.lstat().st_ino == facts.source
        if not (lock or made):
            raise _foreign(folder, kind, path)


def _foreign(folder: Path, kind: Kind, path: Path) -> GgmlExtError:
    return GgmlExtError(f"{folder}: holds {path.name}, which no {kind.name} made; choose an empty folder")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _read_lock(path: Path, kind: Kind) -> _Facts | None:
    try:
        facts = json.loads(path.read_bytes()) if _size(path) <= _MAX_LOCK else None
        if not isinstance(facts, dict) or facts.pop("ggml-ext", None) != kind.name:
            return None
        return _Facts(owner.parse(facts.pop("owner")), **facts)
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
