"""Outputs of the commands: checked against the inputs before the work, written whole after it."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ggml_ext.core import atomic
from ggml_ext.core.errors import GgmlExtError

_PART = re.compile(r"^(?P<stem>.*)-\d{5}-of-(?P<count>\d{5})(?P<rest>.*\.gguf)$", re.IGNORECASE | re.DOTALL)


def check_outputs(
    *outputs: Path | None, inputs: Iterable[Path | None] = (), folders: Iterable[Path | None] = ()
) -> None:
    """Raise GgmlExtError unless ``outputs`` can be written without touching an input or each other.

    ``inputs``: files and folders that the command reads; None stands for an option that was not given. A file
    stands for all parts of a split model, a folder for the files in it. ``folders``: those that a command of
    ours fills, this one or an earlier one: no other file may come into them. Links, hard and symbolic, are
    seen through.
    """
    wanted = [path for path in outputs if path is not None]
    read = [path for path in inputs if path is not None]
    ours = [path for path in folders if path is not None]
    for number, path in enumerate(wanted):
        _check_outside(path, ours)
        _check_place(path)
        for other in wanted[:number]:
            if _same(path, other):
                raise GgmlExtError(f"{path}: named for two outputs; give each a file of its own")
        for source in read:
            found = _read_from(source, path)
            if found is not None:
                raise GgmlExtError(f"{path}: the same file as the input {found}; write to another one")


def check_folder(folder: Path, inputs: Iterable[Path | None], folders: Iterable[Path | None] = ()) -> None:
    """Raise GgmlExtError if the output ``folder`` is one of the inputs or holds one, or lies in one of the
    ``folders`` of check_outputs."""
    _check_outside(folder, (path for path in folders if path is not None))
    for source in inputs:
        if source is not None and _is_within(source, folder):
            raise GgmlExtError(f"{folder}: holds the input {source}; choose another folder")


def _check_outside(path: Path, folders: Iterable[Path]) -> None:
    for folder in folders:
        if _is_within(path, folder):
            raise GgmlExtError(f"{path}: in {folder}, which ggml-ext fills; choose a place outside of it")


def _check_place(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise GgmlExtError(f"{path}: is no regular file; name a file to write")
    try:
        folder = atomic.target(path).parent
    except OSError as error:
        raise GgmlExtError(f"{path}: {error.strerror}; name a file to write") from error
    if not folder.is_dir():
        raise GgmlExtError(f"{path}: the folder {folder} does not exist; create it first")
    if not os.access(folder, os.W_OK):
        raise GgmlExtError(f"{path}: the folder {folder} is read-only; choose another")


def parts(model: Path) -> list[Path]:
    """The files of a GGUF model: every part that lies beside it if it is split, else itself alone."""
    match = _PART.match(model.name)
    if match is None:
        return [model]
    siblings = {model}
    try:
        for path in model.parent.iterdir():
            other = _PART.match(path.name)
            if other is not None and other.groups() == match.groups():
                siblings.add(path)
    except OSError:
        pass  # whoever reads the model says so
    return sorted(siblings)


def identity(path: Path) -> list[Any]:
    """What tells one version of a file from another without reading it: real path, size, time of change.

    Of a split model all parts count.
    """
    facts: list[Any] = []
    for part in parts(path):
        status = part.stat()
        facts += [str(part.resolve()), status.st_size, status.st_mtime_ns]
    return facts


def _read_from(source: Path, path: Path) -> Path | None:
    """The file of the input ``source`` that ``path`` is, None if it is none of them."""
    if not source.is_dir():
        return next((part for part in parts(source) if _same(part, path)), None)
    if not path.exists() or (_is_gguf(path) and (source / "config.json").exists()):
        return None  # a Hugging Face model is not read from GGUF files, which are earlier outputs there
    if _is_within(path, source):
        return path
    return next((file for file in _files(source) if _same(file, path)), None)


def _files(folder: Path) -> Iterator[Path]:
    try:
        yield from (path for path in folder.iterdir() if path.is_file())
    except OSError:
        return


def _is_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def _is_within(path: Path, folder: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # one of them does not exist yet
        return os.path.realpath(one) == os.path.realpath(other)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, whole or not at all; NaN and infinity, which JSON has not, become null."""
    atomic.write_text(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
