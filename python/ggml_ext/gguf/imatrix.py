"""Importance matrices: the mean squared input of every column of every weight matrix.

Files are llama-imatrix's: GGUF with ``<tensor>.in_sum2`` and ``<tensor>.counts`` (one count per expert),
or the older .dat layout. They are read as llama-quantize reads them (llama.cpp, tools/quantize/quantize.cpp,
load_imatrix; common/imatrix-loader.cpp).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.gguf.header import Described, Header, read_header, value
from ggml_ext.gguf.source import Tensor
from ggml_ext.gguf.writer import OutTensor, padding, string_array_key, string_key, uint32_key, write_header
from ggml_ext.runtime.weighting import n_raised, usable

_SUMS, _COUNTS = ".in_sum2", ".counts"
_F32 = 0
_ALIGNMENT = 32


@dataclass(frozen=True)
class Imatrix:
    """``entries``: tensor name -> importances, float32, all experts' rows after one another.

    ``dataset``: the text's name as the file gives it, or "". ``chunks``: how many contexts of text were
    read. ``chunk_length``: tokens per context, 0 where the file does not say (.dat).
    """

    path: Path
    entries: dict[str, NDArray[np.float32]]
    dataset: str
    chunks: int
    chunk_length: int

    def rows(self, tensor: Tensor) -> NDArray[np.float32] | None:
        """Importances of the tensor, float32 [experts, row length], or None if the file has none for it.

        Raises GgmlExtError if the file is for a tensor of another size.
        """
        entry = self.entries.get(tensor.name)
        if entry is None:
            return None
        experts = tensor.dims[2] if len(tensor.dims) > 2 else 1
        if entry.size != experts * tensor.row_length:
            raise GgmlExtError(
                f"{self.path}: {entry.size} importances for {tensor.name}, which needs "
                f"{experts * tensor.row_length}; this file was made with another model"
            )
        return entry.reshape(experts, tensor.row_length)

    def n_raised(self, tensor: Tensor) -> int:
        """How many of the tensor's importances are too small to count (weighting.py), 0 if it has none."""
        rows = self.rows(tensor)
        return 0 if rows is None else n_raised(rows)

    def write_usable(self, path: Path, tensors: Sequence[Tensor]) -> None:
        """Writes the matrix for llama-quantize, the tensors' importances raised where they are too small."""
        raised = {**self.entries}
        for tensor in tensors:
            rows = self.rows(tensor)
            if rows is not None:
                raised[tensor.name] = usable(rows).reshape(-1)
        sums = {name: (entry[None], np.ones(1, np.float32)) for name, entry in raised.items()}
        write(path, sums, self.dataset, self.chunks, self.chunk_length)


def write(
    path: Path,
    sums: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]],
    dataset: str,
    chunks: int,
    chunk_length: int,
) -> None:
    """Writes an importance matrix as llama-imatrix does. sums: tensor -> sums of squares [experts, k] and the
    rows in them [experts]; the others: see Imatrix."""
    out: list[tuple[OutTensor, NDArray[np.float32]]] = []
    for name, (squares, counts) in sums.items():
        out.append((OutTensor(name + _SUMS, squares.shape[::-1], _F32, squares.nbytes), squares))
        out.append((OutTensor(name + _COUNTS, (1, counts.size), _F32, counts.nbytes), counts))
    keys = {
        "general.type": string_key("general.type", "imatrix"),
        "imatrix.datasets": string_array_key("imatrix.datasets", [dataset]),
        "imatrix.chunk_count": uint32_key("imatrix.chunk_count", chunks),
        "imatrix.chunk_size": uint32_key("imatrix.chunk_size", chunk_length),
    }
    with path.open("wb") as file:
        write_header(file, keys, [described for described, _ in out], _ALIGNMENT)
        for described, data in out:
            file.write(data.astype("<f4").tobytes() + padding(described.n_bytes, _ALIGNMENT))


def load(path: Path) -> Imatrix:
    """Reads an importance matrix. Raises GgmlExtError if the file is missing, damaged or no such file, and
    for a pipe or a device: a GGUF file is mapped."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise GgmlExtError(f"{path}: is no regular file; write the importance matrix to one")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            imatrix = _load_gguf(path) if magic == b"GGUF" else _load_dat(path, magic + file.read())
    except OSError as exc:
        raise GgmlExtError(f"{path}: {exc.strerror}; check the path of the importance matrix") from exc
    except (ValueError, KeyError, IndexError, struct.error) as exc:
        raise GgmlExtError(f"{path}: not an importance matrix of llama-imatrix, or damaged ({exc})") from exc
    if not imatrix.entries:
        raise GgmlExtError(f"{path}: holds no importances; compute it again")
    for name, entry in imatrix.entries.items():
        if not np.isfinite(entry).all() or (entry < 0).any():
            raise GgmlExtError(f"{path}: importances of {name} are negative, NaN or Inf; compute it again")
    return imatrix


def _load_gguf(path: Path) -> Imatrix:
    header = read_header(path)
    tensors = {tensor.name: tensor for tensor in header.tensors}
    entries = {}
    for name, described in tensors.items():
        if name.endswith(_SUMS):
            base = name.removesuffix(_SUMS)
            counts = _floats(path, header, tensors[base + _COUNTS])
            entries[base] = _mean(_floats(path, header, described), counts)
    datasets = value(header.keys["imatrix.datasets"]) if "imatrix.datasets" in header.keys else []
    if not isinstance(datasets, list):
        raise ValueError("imatrix.datasets is no array")
    return Imatrix(
        path,
        entries,
        str(datasets[0]) if datasets else "",
        _integer(header, "imatrix.chunk_count"),
        _integer(header, "imatrix.chunk_size"),
    )


def _floats(path: Path, header: Header, tensor: Described) -> NDArray[np.float32]:
    count = math.prod(tensor.dims)
    start = header.data + tensor.offset
    if tensor.type_id != _F32 or start + 4 * count > path.stat().st_size:
        raise ValueError(f"{tensor.name} is not f32, or incomplete")
    return np.fromfile(path, "<f4", count, offset=start).astype(np.float32, copy=False)


def _integer(header: Header, key: str) -> int:
    found = value(header.keys[key]) if key in header.keys else 0
    if not isinstance(found, int) or not 0 <= found < 2**32:
        raise ValueError(f"{key} is no number, or an impossible one")
    return found


def _mean(sums: NDArray[np.float32], counts: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sums [experts, k] over counts [experts]; columns of an expert that no token reached weigh the same."""
    counts = np.rint(counts).reshape(-1, 1)
    if not counts.size:
        raise ValueError("counts are missing")
    per_expert = sums.reshape(counts.size, -1)
    seen = counts > 0
    with np.errstate(over="ignore", invalid="ignore"):  # load refuses what is not finite
        mean = np.where(seen, per_expert / np.where(seen, counts, 1), np.float32(1))
    return mean.astype(np.float32).reshape(-1)


def _load_dat(path: Path, data: bytes) -> Imatrix:
    """int32 entries, then per entry: length and name, int32 calls, int32 n, n float32 sums over calls;
    at the end, optionally, int32 chunks and the text's name."""
    position = 0

    def take(n_bytes: int) -> bytes:
        nonlocal position
        if n_bytes < 0 or position + n_bytes > len(data):
            raise ValueError("the file ends too early")
        position += n_bytes
        return data[position - n_bytes : position]

    def integer() -> int:
        return int(struct.unpack("<i", take(4))[0])

    entries = {}
    for _ in range(integer()):
        name = take(integer()).decode("utf-8")
        calls, n = integer(), integer()
        sums = np.frombuffer(take(4 * n), "<f4").astype(np.float32)
        entries[name] = sums / np.float32(max(calls, 1))
    chunks, dataset = 0, ""
    if position < len(data):
        chunks = integer()
        dataset = take(integer()).decode("utf-8", "replace") if position < len(data) else ""
    return Imatrix(path, entries, dataset, chunks, 0)
