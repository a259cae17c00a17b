"""Digests, and the folder of what is kept between runs. The standard library only: upstream.py needs this
before anything is installed."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from ggml_ext.core.errors import GgmlExtError


def cache_dir() -> Path:
    """Folder of what is kept between runs: GGML_EXT_CACHE, else ggml-ext in the XDG cache folder.

    Raises GgmlExtError where there is neither, nor a home folder.
    """
    if override := os.environ.get("GGML_EXT_CACHE"):
        return Path(override)
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "ggml-ext"
    try:
        return Path.home() / ".cache" / "ggml-ext"
    except RuntimeError as error:
        raise GgmlExtError("no folder for a cache: there is no home folder; set GGML_EXT_CACHE") from error


def require_no_device(path: Path) -> None:
    """Raises GgmlExtError for a device: one such as /dev/zero never ends. What is not there passes."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # whoever opens it says so
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        raise GgmlExtError(f"{path}: is a device; name a file")


MOST_TEXT = 1 << 30
"""Bytes of a text, at most: a thousand novels."""


def read_text_bytes(path: Path) -> bytes:
    """A text file, or what a pipe gives. Raises OSError, and GgmlExtError for a device and for one that is
    longer than MOST_TEXT."""
    require_no_device(path)
    found = bytearray()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            found += chunk
            if len(found) > MOST_TEXT:
                raise GgmlExtError(f"{path}: a text of more than {MOST_TEXT >> 20} MiB; give a part of it")
    return bytes(found)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()


def digest(facts: Any) -> str:
    """Short digest of a JSON value."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
