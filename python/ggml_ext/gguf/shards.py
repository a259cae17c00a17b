"""The files of a model: one GGUF file, or the parts that llama-gguf-split cuts, which count as one model.

The parts of a split model are named STEM-00001-of-00003.gguf and so on; llama.cpp finds the others by the
first one's name (llama.cpp, src/llama.cpp: llama_split_path). The first holds the keys, and may hold no
tensor; all hold split.no, from 0, and split.count.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.gguf.header import Header, read_header, value

_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True)
class Part:
    """One file of a model. ``size``: in bytes."""

    path: Path
    header: Header
    size: int


def read_parts(path: Path) -> list[Part]:
    """Headers of the model's files; ``path`` is the only one or the first.

    Raises GgmlExtError, which names the file, for one that is missing, unreadable, no GGUF file or damaged,
    for another part than the first, and for parts that are renamed, missing or of another model.
    """
    first = _read(path)
    count = _number(first, "split.count", 1)
    if count < 2:
        return [first]
    _require_name(first, count)
    parts = [first]
    for other in named_parts(path)[1:]:
        part = _read(other)
        number = _number(part, "split.no", 0)
        if _number(part, "split.count", 1) != count or number != len(parts):
            raise GgmlExtError(
                f"{other}: not part {len(parts) + 1} of {count} of {path.name}; get this file again"
            )
        parts.append(part)
    _require_whole(path, parts)
    return parts


def named_parts(path: Path) -> list[Path]:
    """The files that a first part's name stands for, there or not; any other name stands for itself."""
    match = _NAME.fullmatch(path.name)
    if match is None or int(match["number"]) != 1:
        return [path]
    numbers = range(1, max(int(match["count"]), 1) + 1)
    return [path.with_name(f"{match['stem']}-{number:05}-of-{match['count']}.gguf") for number in numbers]


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Turns what reading the header of ``path`` or a value in it can raise into a GgmlExtError about it."""
    try:
        yield
    except OSError as exc:
        raise GgmlExtError(f"{path}: {exc.strerror}; check the path and its permissions") from exc
    except (ValueError, OverflowError) as exc:
        raise GgmlExtError(f"{path}: damaged GGUF file, {exc}; download or convert it again") from exc


def _read(path: Path) -> Part:
    with named_errors(path):
        status = path.stat()
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise GgmlExtError(f"{path}: no regular file; give a GGUF file that lies on a disk")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise GgmlExtError(
                    f"{path}: not a GGUF file; give one, or a Hugging Face model directory (with config.json)"
                )
        return Part(path, read_header(path), status.st_size)


def _number(part: Part, key: str, default: int) -> int:
    entry = part.header.keys.get(key)
    with named_errors(part.path):
        found: Any = default if entry is None else value(entry)
    if not isinstance(found, int):
        raise GgmlExtError(f"{part.path}: damaged GGUF file, its {key} is no number; download it again")
    return found


def _require_name(first: Part, count: int) -> None:
    """A first part has the name by which llama.cpp finds the others."""
    number = _number(first, "split.no", 0) + 1
    match = _NAME.fullmatch(first.path.name)
    if match is None or (int(match["number"]), int(match["count"])) != (number, count):
        raise GgmlExtError(
            f"{first.path}: part {number} of {count} of a split model under another name; give all parts "
            f"their names back, which end in -{number:05}-of-{count:05}.gguf"
        )
    if number != 1:
        raise GgmlExtError(f"{first.path}: not the first part of a split model; give the one with -00001-of-")


def _require_whole(path: Path, parts: list[Part]) -> None:
    names = [tensor.name for part in parts for tensor in part.header.tensors]
    wanted = _number(parts[0], "split.tensors.count", len(names))
    if len(set(names)) != len(names) or len(names) != wanted:
        raise GgmlExtError(
            f"{path}: its {len(parts)} parts hold {len(names)} tensors ({len(set(names))} names) in place of "
            f"{wanted}; they are not of one model, get them again"
        )
