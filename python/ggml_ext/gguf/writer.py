"""Writes a GGUF file front to back, its tensors a few rows at a time.

gguf.GGUFWriter wants each tensor whole and keys as Python values; here the keys of the source pass through
as bytes and no tensor is ever complete in memory. Layout (GGUF version 3, little endian): magic, version,
number of tensors, number of keys, keys, tensor descriptions, padding, tensor data, each padded.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from gguf import GGUFValueType

_MAGIC = b"GGUF"
_VERSION = 3


@dataclass(frozen=True)
class OutTensor:
    """``dims``: GGUF order, dims[0] is the row length in weights. ``type_id``: ggml's number."""

    name: str
    dims: tuple[int, ...]
    type_id: int
    n_bytes: int


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def string_key(name: str, value: str) -> bytes:
    """A key-value entry that holds a string."""
    return _string(name) + struct.pack("<I", GGUFValueType.STRING) + _string(value)


def uint32_key(name: str, value: int) -> bytes:
    """A key-value entry that holds an unsigned 32-bit number."""
    return _string(name) + struct.pack("<II", GGUFValueType.UINT32, value)


def _array_key(name: str, inner: GGUFValueType, count: int, data: bytes) -> bytes:
    return _string(name) + struct.pack("<IIQ", GGUFValueType.ARRAY, inner, count) + data


def uint32_array_key(name: str, values: Sequence[int]) -> bytes:
    """A key-value entry that holds an array of unsigned 32-bit numbers."""
    return _array_key(name, GGUFValueType.UINT32, len(values), struct.pack(f"<{len(values)}I", *values))


def float32_array_key(name: str, values: Sequence[float]) -> bytes:
    """A key-value entry that holds an array of 32-bit floats."""
    return _array_key(name, GGUFValueType.FLOAT32, len(values), struct.pack(f"<{len(values)}f", *values))


def string_array_key(name: str, values: Sequence[str]) -> bytes:
    """A key-value entry that holds an array of strings."""
    return _array_key(name, GGUFValueType.STRING, len(values), b"".join(map(_string, values)))


def padding(n_bytes: int, alignment: int) -> bytes:
    """Zeros up to the next multiple of the alignment."""
    return bytes(-n_bytes % alignment)


def write_header(
    file: BinaryIO, keys: Mapping[str, bytes], tensors: Sequence[OutTensor], alignment: int
) -> None:
    """Writes everything in front of the first tensor's data. ``keys``: name -> whole entry."""
    header = [_MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(keys)), *keys.values()]
    offset = 0
    for tensor in tensors:
        header.append(_string(tensor.name))
        n = len(tensor.dims)
        header.append(struct.pack(f"<I{n}QIQ", n, *tensor.dims, tensor.type_id, offset))
        offset += tensor.n_bytes + len(padding(tensor.n_bytes, alignment))
    data = b"".join(header)
    file.write(data + padding(len(data), alignment))
