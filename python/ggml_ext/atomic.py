"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ggml_ext.errors import GgmlExtError


@contextmanager
def atomic_path(final: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``final``; renames it to ``final`` when the block succeeds.

    On any exception, KeyboardInterrupt included, the temporary file is removed and ``final`` stays as it
    was. An OSError (full disk, read-only folder) becomes a GgmlExtError that names ``final``, and so does a
    ``final`` that exists and is no regular file: renaming would replace a device or a folder.
    """
    if final.exists() and not final.is_file():
        raise GgmlExtError(f"cannot write: {final} (not a regular file); name a file")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{final.name}.", suffix=".part", dir=final.parent)
    except OSError as error:
        raise _cannot_write(final, error) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        # mkstemp makes files that only their owner can read; give the usual mode instead.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(final)
    except OSError as error:
        raise _cannot_write(final, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _cannot_write(final: Path, error: OSError) -> GgmlExtError:
    reason = error.strerror or str(error)
    return GgmlExtError(f"cannot write: {final} ({reason}); free some space or choose a writable place")


def write_text(final: Path, text: str) -> None:
    """Writes a whole text file (UTF-8; file names that are not are escaped) atomically."""
    with atomic_path(final) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
