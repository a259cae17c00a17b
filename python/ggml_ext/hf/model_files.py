"""Which model a folder of results is of: digests of the files that decide what the model computes."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.files import sha256_of
from ggml_ext.gguf.source import Source, open_gguf
from ggml_ext.hf import folder as hf
from ggml_ext.hf.files import SMALL, SMALL_IN_FOLDERS, check_weights, shown

_SAMPLE = 4096  # bytes of every tensor
_DIGITS = 32


def of(model: Path) -> dict[str, str]:
    """of_folder or of_gguf, whichever ``model`` is."""
    return of_folder(model) if model.is_dir() else of_gguf(open_gguf(model))


def of_folder(folder: Path) -> dict[str, str]:
    """Name -> digest of the files of a Hugging Face folder that decide what is in its GGUF file: settings,
    tokenizer, chat template and model card whole, of weights the header, the size and the start of every
    tensor. A folder that is moved or copied stays the same model.

    Raises GgmlExtError if it is incomplete.
    """
    weights = hf.check(folder)
    headers = check_weights(weights)
    try:
        found = {path: short_sha256(path) for path in {*small_files(folder), *weights} - headers.keys()}
        for path, header in headers.items():
            found[path] = _weights_digest(path, [(entry.start, entry.end) for entry in header.values()])
    except OSError as exc:
        raise GgmlExtError(f"{exc.filename or folder}: {exc.strerror}; check its permissions") from exc
    return {path.relative_to(folder).as_posix(): found[path] for path in sorted(found)}


def small_files(folder: Path) -> list[Path]:
    """The files beside the weights that decide what is in a Hugging Face folder's GGUF file."""
    found = (path for pattern in (*SMALL, *SMALL_IN_FOLDERS) for path in folder.glob(pattern))
    return sorted({path for path in found if path.is_file()})


def of_gguf(source: Source) -> dict[str, str]:
    """Part of the model -> digest of its header, its size and the start of every tensor. A file under another
    name stays the same model.

    Raises GgmlExtError for a file that can no longer be read.
    """
    found = {}
    for number, path in enumerate(source.files, 1):
        places = [(t.offset, t.offset + t.n_bytes) for t in source.tensors if t.path == path]
        try:
            found[f"file {number} of {len(source.files)}"] = _weights_digest(path, places)
        except OSError as exc:
            raise GgmlExtError(f"{path}: {exc.strerror}; check its permissions") from exc
    return found


def short_sha256(path: Path) -> str:
    """The first digits of the file's SHA-256. Raises OSError."""
    return sha256_of(path)[:_DIGITS]


def _weights_digest(path: Path, places: Collection[tuple[int, int]]) -> str:
    """Of size, header and the first bytes of every tensor: two models of the same shapes differ in these.

    places: where each tensor begins and ends in the file."""
    digest = hashlib.sha256(str(path.stat().st_size).encode())
    with path.open("rb") as file:
        digest.update(file.read(min((start for start, _ in places), default=0)))
        for start, end in sorted(places):
            file.seek(start)
            digest.update(file.read(min(_SAMPLE, end - start)))
    return digest.hexdigest()[:_DIGITS]


def changed(there: dict[str, str], here: dict[str, str]) -> str:
    """What happened to the files of a model; nothing if they are the same."""
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if not names:
        return ""
    how = "came" if names[0] not in there else "has gone" if names[0] not in here else "has changed"
    return f"{shown(names[0])} {how}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def require_equal_plans(found: Mapping[str, Any], wanted: Mapping[str, Any], model: str, what: str) -> None:
    """Raises GgmlExtError, naming what differs, unless two plans are the same. model: the field with the
    model's digests. what: the folder and what it holds."""
    lines = []
    for name, old in found.items():
        new = wanted[name]
        if old == new:
            continue
        if name == model:
            lines.append(f"another model: {changed(old, new)}")
        elif name == "text":
            lines.append("another calibration text")
        elif isinstance(old, dict) and isinstance(new, dict):
            keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            there, here = (values.get(keys[0], "absent") for values in (old, new))
            lines.append(f"{name}: {keys[0]} {there} there, {here} here{more}")
        else:
            lines.append(f"{name} {old} there, {new} here")
    if lines:
        raise GgmlExtError(
            f"{what} with other settings ({'; '.join(lines)}); repeat its settings to go on, or delete the "
            "folder or choose another"
        )
