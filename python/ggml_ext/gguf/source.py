"""Reads the model to convert: a GGUF file (or its shards), tensor by tensor and a few rows at a time.

The weights are read with plain file reads, not through a memory map: mapped pages count as the process's
memory until the kernel takes them back, rows read into one buffer do not add up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.registry import SOURCE_TYPES
from ggml_ext.gguf.header import Described, value
from ggml_ext.gguf.shards import Part, named_errors, read_parts
from ggml_ext.runtime import native

_SLAB_WEIGHTS = 4 * 1024 * 1024


@dataclass(frozen=True)
class Shape:
    """What there is to know of a tensor without its data. ``dims``: GGUF order, dims[0] is the row length."""

    name: str
    dims: tuple[int, ...]
    type_name: str


@dataclass(frozen=True)
class Tensor:
    """One tensor of a GGUF file.

    ``dims``: GGUF order, dims[0] is the row length in weights. ``type_name``: lower case, as in
    ggml_type_name. ``offset``, ``n_bytes``: where its data lies in ``path``.
    """

    name: str
    dims: tuple[int, ...]
    type_name: str
    path: Path
    offset: int
    n_bytes: int

    @property
    def row_length(self) -> int:
        return self.dims[0]

    @property
    def n_rows(self) -> int:
        return math.prod(self.dims[1:])

    @property
    def n_weights(self) -> int:
        return self.row_length * self.n_rows

    @property
    def row_bytes(self) -> int:
        return self.n_bytes // max(self.n_rows, 1)

    @property
    def shape(self) -> Shape:
        return Shape(self.name, self.dims, self.type_name)


@dataclass(frozen=True)
class Source:
    """A model's header. ``path``: its only or first file. ``keys``: name -> the whole key-value entry as it
    stands in that file. ``files``: all of them."""

    path: Path
    arch: str
    alignment: int
    keys: dict[str, bytes]
    tensors: tuple[Tensor, ...]
    files: tuple[Path, ...]

    @property
    def n_blocks(self) -> int:
        """Blocks by the file's own count, 0 where it gives none."""
        key = f"{self.arch}.block_count"
        found = value(self.keys[key]) if key in self.keys else 0
        return found if isinstance(found, int) else 0


def open_gguf(path: Path) -> Source:
    """Reads the header of a GGUF file, or of all its parts if ``path`` is the first of several.

    Raises GgmlExtError for a file that is missing, unreadable, truncated, malformed or big-endian, for parts
    that read_parts refuses, and for a model without tensors or with one that is empty, of any number of rows.
    """
    parts = read_parts(path)
    header = parts[0].header
    tensors = tuple(_tensor(part, described) for part in parts for described in part.header.tensors)
    if "general.architecture" not in header.keys:
        raise GgmlExtError(f"{path}: no key general.architecture; this is no model, or a damaged one")
    if not tensors:
        raise GgmlExtError(f"{path}: holds no tensors; this is no model, or a vocabulary only")
    with named_errors(path):
        arch = str(value(header.keys["general.architecture"]))
    return Source(path, arch, header.alignment, header.keys, tensors, tuple(part.path for part in parts))


def _tensor(part: Part, described: Described) -> Tensor:
    if 0 in described.dims:
        raise GgmlExtError(
            f"{part.path}: tensor {described.name} is empty ({' x '.join(map(str, described.dims))}); "
            "damaged, download it again"
        )
    try:
        name = native.type_name(described.type_id)
        row_bytes = native.row_size(name, described.dims[0])
    except GgmlExtError as exc:
        raise GgmlExtError(
            f"{part.path}: tensor {described.name} has type {described.type_id} and rows of "
            f"{described.dims[0]} weights ({exc}); made by a newer version, or damaged"
        ) from exc
    n_bytes = row_bytes * math.prod(described.dims[1:])
    offset = part.header.data + described.offset
    if offset + n_bytes > part.size:
        raise GgmlExtError(
            f"{part.path}: truncated GGUF file, tensor {described.name} ends beyond it; download it again"
        )
    return Tensor(described.name, described.dims, name.lower(), part.path, offset, n_bytes)


@contextmanager
def reading(tensor: Tensor) -> Iterator[BufferedReader]:
    """The file that holds the tensor, opened for read_bytes and read_floats. Raises GgmlExtError."""
    try:
        with tensor.path.open("rb") as file:
            yield file
    except EOFError as exc:
        raise GgmlExtError(f"{tensor.path}: changed while it was read; convert it again") from exc
    except OSError as exc:
        raise GgmlExtError(f"{tensor.path}: {exc.strerror}; check the disk it lies on") from exc


def read_bytes(file: BufferedReader, tensor: Tensor, first: int, count: int) -> NDArray[np.uint8]:
    """Rows first .. first + count - 1 as they are stored: uint8 [count, row_bytes]."""
    data = np.empty((count, tensor.row_bytes), np.uint8)
    file.seek(tensor.offset + first * tensor.row_bytes)
    if file.readinto(data.data) != data.nbytes:
        raise EOFError
    return data


def read_floats(file: BufferedReader, tensor: Tensor, first: int, count: int) -> NDArray[np.float32]:
    """The same rows as float32 [count, row_length]. The tensor is f32, f16, bf16 or q8_0.

    Raises GgmlExtError if a value is NaN or infinite.
    """
    assert tensor.type_name in SOURCE_TYPES
    data = read_bytes(file, tensor, first, count)
    if tensor.type_name == "q8_0":
        rows = native.dequantize("q8_0", data, tensor.row_length)
    else:
        rows = to_float32(data, tensor.type_name)
    finite = np.isfinite(rows)
    if not finite.all():
        row = first + int(np.argmin(finite.all(axis=1)))
        raise GgmlExtError(
            f"{tensor.path}: tensor {tensor.name} holds NaN or Inf (row {row}); "
            "the model is damaged, download or train it again"
        )
    return rows


def float_slabs(tensor: Tensor) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """(first row, rows as read_floats gives them), front to back, a bounded number of weights at a time."""
    step = max(1, _SLAB_WEIGHTS // max(tensor.row_length, 1))
    with reading(tensor) as file:
        for first in range(0, tensor.n_rows, step):
            yield first, read_floats(file, tensor, first, min(step, tensor.n_rows - first))


def to_float32(data: NDArray[np.uint8], type_name: str) -> NDArray[np.float32]:
    """uint8 [rows, bytes] of type f32, f16 or bf16 -> float32 [rows, weights]; bf16 is f32's upper half."""
    rows: NDArray[Any]
    if type_name == "f32":
        rows = data.view("<f4")
    elif type_name == "f16":
        rows = data.view("<f2").astype(np.float32)
    else:
        bits = data.view("<u2").astype(np.uint32)
        bits <<= 16
        rows = bits.view(np.float32)
    return rows
