"""Files that appear whole or not at all, and temporary names that never stay for ever.

Every temporary file or folder has a record beside it, ``.ggml-ext-TOKEN.run``: the process that made it
(owner.py), its name and its inode. A run removes what it made; what a killed run left is removed by the next
one that writes into the same folder. Nothing without a record, of another inode or of a living run is ever
removed. A record is empty for a moment: whoever sweeps may remove it then, under its lock, and the run that
finds its record gone begins anew.
"""

from __future__ import annotations

import atexit
import errno
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from ggml_ext.core import owner
from ggml_ext.core.errors import GgmlExtError

_RECORD = (".ggml-ext-", ".run")
_TOKEN = re.compile(r"[0-9a-f]{16}")
_MAX_RECORD = 8192
_NAME_BYTES = 120  # of the final name within a temporary one, which may have 255 in all
_UNKNOWN_DAYS = 14
"""Age of leftovers from which a run on a machine or in a container that cannot be seen counts as dead."""

_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)


@contextmanager
def atomic_path(final: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``final``; renames it to ``final`` when the block succeeds.

    On any exception, KeyboardInterrupt included, the temporary file is removed and ``final`` stays as it
    was. Through a symbolic link its target is written; the link stays. An OSError (full disk, read-only
    folder) becomes a GgmlExtError that names ``final``, and so does a ``final`` that exists and is no regular
    file: renaming would replace a device or a folder.
    """
    if final.exists() and not final.is_file():
        raise GgmlExtError(f"cannot write: {final} (not a regular file); name a file")
    try:
        place = target(final)
        with _claimed(place, ".part", _make_file) as temporary:
            yield temporary
            with temporary.open("rb") as written:
                _sync(written.fileno())
            with suppress(OSError):  # file systems without modes refuse
                # The file is made for its owner alone; give the usual mode instead.
                umask = os.umask(0)
                os.umask(umask)
                temporary.chmod(0o666 & ~umask)
            temporary.replace(place)
            _sync_folder(place.parent)
    except OSError as error:
        raise _cannot_write(final, error) from error


@contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """A folder beside the output ``out``, on the same file system, gone at the end whatever happens."""
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(_claimed(target(out), ".work", _make_folder))
        except OSError as error:
            raise _cannot_write(out, error) from error
        yield folder


def target(final: Path) -> Path:
    """``final``, or where it leads to if it is a symbolic link. Raises OSError for links in a circle."""
    if not final.is_symlink():
        return final
    place = Path(os.path.realpath(final))
    if place.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(final))
    return place


def _cannot_write(final: Path, error: OSError) -> GgmlExtError:
    reason = error.strerror or str(error)
    return GgmlExtError(f"cannot write: {final} ({reason}); free some space or choose a writable place")


def write_text(final: Path, text: str) -> None:
    """Writes a whole text file atomically: UTF-8, with escapes for names that are none."""
    with atomic_path(final) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def _sync(handle: int) -> None:
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def _sync_folder(folder: Path) -> None:
    """Makes a renaming survive a power failure, where the file system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _make_file(path: Path) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def _make_folder(path: Path) -> None:
    path.mkdir(0o700)


class _Claim:
    """A temporary name of this run and its record, whose lock is held as long as the run works on it."""

    def __init__(self, place: Path, suffix: str) -> None:
        self.pid = os.getpid()
        self._place, self._suffix = place, suffix
        self._file: IO[bytes] | None = None
        self._draw()

    def _draw(self) -> None:
        """A token, and the names that follow from it."""
        token = secrets.token_hex(8)
        stem = self._place.name
        if len(os.fsencode(stem)) > _NAME_BYTES:
            stem = os.fsencode(stem)[:_NAME_BYTES].decode("utf-8", "ignore")
        self.path = self._place.with_name(f".{stem}.{token}{self._suffix}")
        self._record = self._place.with_name(token.join(_RECORD))

    def begin(self, make: Callable[[Path], None]) -> None:
        """Writes the record, then makes the file or folder, then notes its inode. Raises OSError."""
        _claims.append(self)
        while not self._begun(make):
            self._release()
            self._draw()

    def _begun(self, make: Callable[[Path], None]) -> bool:
        """False if somebody who sweeps has met the record while it was empty."""
        handle = os.open(self._record, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        with os.fdopen(os.dup(handle), "wb", 0) as file:
            self._file = os.fdopen(handle, "rb", 0)
            try:
                owner.lock(file)
            except BlockingIOError:
                return False
            before = self._facts(file, None)
            file.write(before)
            if not os.path.lexists(self._record):  # nobody else makes a file of this name
                return False
            make(self.path)
            file.seek(0)
            file.write(self._facts(file, self.path.lstat().st_ino).ljust(len(before)))
            with suppress(OSError):
                os.fsync(file.fileno())
        return True

    def _release(self) -> None:
        self._record.unlink(missing_ok=True)
        if self._file is not None:
            self._file.close()

    def _facts(self, file: IO[bytes], inode: int | None) -> bytes:
        facts = {
            "ggml-ext": "temporary",
            "owner": asdict(owner.current()),
            "record": os.fstat(file.fileno()).st_ino,
            "name": self.path.name,
            "inode": inode,
        }
        return json.dumps(facts).encode()

    def end(self) -> None:
        """Removes what is left of it. What cannot be removed now is tried again when the process ends."""
        with suppress(OSError):
            _remove(self.path)
            self._release()
            _claims.remove(self)


_claims: list[_Claim] = []
"""Of this process, not ended yet."""


@atexit.register
def tidy() -> None:
    """Removes all that this process has left: where a signal came between, and what failed before."""
    for claim in list(_claims):
        if claim.pid == os.getpid():  # not those of the process that forked this one
            claim.end()


@contextmanager
def _claimed(place: Path, suffix: str, make: Callable[[Path], None]) -> Iterator[Path]:
    """A new temporary file or folder beside ``place``, removed at the end unless it was renamed."""
    sweep(place.parent)
    claim = _Claim(place, suffix)
    try:
        claim.begin(make)
        yield claim.path
    finally:
        claim.end()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Removes what dead runs have left in the folder, by their records. Never fails."""
    with suppress(OSError):
        for record in sorted(folder.glob("*".join(_RECORD))):
            with suppress(OSError, ValueError):
                _sweep(record)


def _sweep(record: Path) -> None:
    with os.fdopen(os.open(record, os.O_RDWR | os.O_NOFOLLOW), "r+b") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_RECORD:
            return
        if status.st_size == 0:
            _remove_unwritten(record, file)
            return
        facts: Any = json.loads(file.read())
        if not isinstance(facts, dict) or facts.get("ggml-ext") != "temporary":
            return
        name, token = str(facts.get("name")), _token(record)
        if facts.get("record") != status.st_ino or not name.endswith((f".{token}.part", f".{token}.work")):
            return
        if not name.startswith(".") or "/" in name:
            return
        path = record.with_name(name)
        made_by, locked = owner.parse(facts.get("owner")), owner.lock(file)
        if not _is_dead(made_by, locked, path):
            return
        found = path.lstat() if os.path.lexists(path) else None
        if found is not None and found.st_ino == facts.get("inode"):
            _remove(path)
        elif found is not None and facts.get("inode") is None:
            _remove_empty(path, found)
        record.unlink()


def _token(record: Path) -> str:
    return record.name.removeprefix(_RECORD[0]).removesuffix(_RECORD[1])


def _remove_unwritten(record: Path, file: IO[bytes]) -> None:
    """For a run that was killed before it wrote its record; nothing tells one that lives without a lock."""
    if not _TOKEN.fullmatch(_token(record)) or not owner.lock(file):
        return
    status = os.fstat(file.fileno())
    if status.st_size == 0 and record.lstat().st_ino == status.st_ino:
        record.unlink()


def _is_dead(made_by: owner.Owner, locked: bool, path: Path) -> bool:
    alive = owner.lives(made_by)
    if alive is None and made_by.boot == owner.current().boot:
        return locked  # another container on this kernel, whose locks hold here too
    if alive is None:
        return path.exists() and time.time() - path.stat().st_mtime > _UNKNOWN_DAYS * 86400
    return not alive


def _remove_empty(path: Path, found: os.stat_result) -> None:
    """For a run that was killed between making something and noting its inode."""
    if stat.S_ISDIR(found.st_mode):
        path.rmdir()
    elif stat.S_ISREG(found.st_mode) and found.st_size == 0:
        path.unlink()
