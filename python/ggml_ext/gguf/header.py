"""Reads the header of a GGUF file: keys as bytes, tensors as descriptions.

gguf.GGUFReader makes several numpy objects of every string: a vocabulary of 150,000 tokens costs it seconds
and 700 MB. Here a key's value is stepped over and kept as it stands, which is also what copying it to
another file needs: an empty array or a string that is not UTF-8 survives.

Layout (versions 2 and 3, little endian): "GGUF", uint32 version, uint64 tensors, uint64 keys; per key its
name, uint32 type, value; per tensor its name, uint32 n, n times uint64 dims, uint32 type, uint64 offset; data
from the next multiple of the alignment on. A string is its uint64 length and its bytes, an array is uint32
type, uint64 length and its values.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4
_INT32_MAX, _INT64_MAX = 2**31 - 1, 2**63 - 1
_DEFAULT_ALIGNMENT = 32
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Described:
    """A tensor's description. ``dims``: dims[0] is the row length. ``offset``: from the start of the data."""

    name: str
    dims: tuple[int, ...]
    type_id: int
    offset: int


@dataclass(frozen=True)
class Header:
    """``keys``: name -> the whole entry. ``data``: where the tensors' data begins in the file."""

    keys: dict[str, bytes]
    tensors: tuple[Described, ...]
    alignment: int
    data: int


class _Cursor:
    """Reads forward; ValueError where the file ends or a field cannot be."""

    def __init__(self, data: mmap.mmap | bytes) -> None:
        self.data = data
        self.position = 0

    def skip(self, n_bytes: int) -> int:
        """Steps over the bytes and returns where they began."""
        start = self.position
        if n_bytes > len(self.data) - start:
            raise ValueError(f"it ends within the header, at byte {len(self.data)}")
        self.position += n_bytes
        return start

    def number(self, code: str) -> int:
        start = self.skip(struct.calcsize(code))
        (value,) = struct.unpack_from(f"<{code}", self.data, start)
        return int(value)

    def text(self) -> str:
        length = self.number("Q")
        start = self.skip(length)
        return self.data[start : start + length].decode("utf-8")

    def skip_strings(self, count: int) -> None:
        for _ in range(count):
            start = self.skip(_LENGTH.size)
            self.skip(_LENGTH.unpack_from(self.data, start)[0])

    def skip_value(self, type_id: int) -> None:
        if type_id == _STRING:
            self.skip_strings(1)
        elif type_id == _ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner == _STRING:
                self.skip_strings(count)
            else:
                self.skip(count * _size(inner))
        else:
            self.skip(_size(type_id))


def _size(type_id: int) -> int:
    if type_id not in _SCALARS:
        raise ValueError(f"it holds a value of unknown type {type_id}")
    return struct.calcsize(f"<{_SCALARS[type_id]}")


def read_header(path: Path) -> Header:
    """Raises ValueError, saying how the file is damaged, and OSError."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _parse(_Cursor(data))


def _parse(cursor: _Cursor) -> Header:
    cursor.skip(4)
    version = cursor.number("I")
    if version not in (2, 3):
        order = "big-endian" if version & 0xFFFF == 0 else f"version {version}"
        raise ValueError(f"its {order} layout is not supported")
    n_tensors, n_keys = cursor.number("Q"), cursor.number("Q")
    keys = dict(_entry(cursor) for _ in range(n_keys))
    tensors = tuple(_described(cursor) for _ in range(n_tensors))
    if len(keys) != n_keys or len({tensor.name for tensor in tensors}) != n_tensors:
        raise ValueError("a name occurs twice")
    alignment = _DEFAULT_ALIGNMENT
    if "general.alignment" in keys:
        alignment = value(keys["general.alignment"])
        if not isinstance(alignment, int):
            raise ValueError("its alignment is no number")
    if alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"its alignment {alignment} is no power of two")
    return Header(keys, tensors, alignment, cursor.position + -cursor.position % alignment)


def _entry(cursor: _Cursor) -> tuple[str, bytes]:
    start = cursor.position
    name = cursor.text()
    cursor.skip_value(cursor.number("I"))
    return name, bytes(cursor.data[start : cursor.position])


def _described(cursor: _Cursor) -> Described:
    name, n_dims = cursor.text(), cursor.number("I")
    if not 1 <= n_dims <= _MAX_DIMS:
        raise ValueError(f"tensor {name} has {n_dims} dimensions")
    dims = tuple(cursor.number("Q") for _ in range(n_dims))
    type_id, offset = cursor.number("I"), cursor.number("Q")
    if math.prod(max(n, 1) for n in dims) > _INT64_MAX or type_id > _INT32_MAX:
        raise ValueError(f"tensor {name} has impossible dimensions or type")
    return Described(name, dims, type_id, offset)


def value(entry: bytes) -> Any:
    """The value of an entry: int, float, bool, str, or a list of one of them."""
    cursor = _Cursor(entry)
    cursor.text()
    type_id = cursor.number("I")
    if type_id == _ARRAY:
        inner, count = cursor.number("I"), cursor.number("Q")
        if inner == _STRING:
            return [cursor.text() for _ in range(count)]
        start = cursor.skip(count * _size(inner))
        return list(struct.unpack_from(f"<{count}{_SCALARS[inner]}", cursor.data, start))
    return _scalar(cursor, type_id)


def _scalar(cursor: _Cursor, type_id: int) -> int | float | str:
    if type_id == _STRING:
        return cursor.text()
    code = f"<{_SCALARS[type_id]}"
    number: int | float
    (number,) = struct.unpack_from(code, cursor.data, cursor.skip(struct.calcsize(code)))
    return number
