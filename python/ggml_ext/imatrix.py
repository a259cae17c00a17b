"""Importance matrices: the mean squared input of every column of every weight matrix.

Files are llama-imatrix's: GGUF with ``<tensor>.in_sum2`` and ``<tensor>.counts`` (one count per expert),
or the older .dat layout. They are read as llama-quantize reads them (llama.cpp, tools/quantize/quantize.cpp,
load_imatrix; common/imatrix-loader.cpp).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from ggml_ext.errors import GgmlExtError
from ggml_ext.source import Tensor

_SUMS, _COUNTS = ".in_sum2", ".counts"


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


def load(path: Path) -> Imatrix:
    """Reads an importance matrix. Raises GgmlExtError if the file is missing, damaged or no such file."""
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
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    entries = {}
    for name, sums in tensors.items():
        if name.endswith(_SUMS):
            base = name.removesuffix(_SUMS)
            counts = tensors[base + _COUNTS]
            entries[base] = _mean(np.asarray(sums, np.float32), np.asarray(counts, np.float32))
    datasets = reader.fields.get("imatrix.datasets")
    names = datasets.contents() if datasets is not None else []
    return Imatrix(
        path,
        entries,
        str(names[0]) if names else "",
        _integer(reader, "imatrix.chunk_count"),
        _integer(reader, "imatrix.chunk_size"),
    )


def _integer(reader: gguf.GGUFReader, key: str) -> int:
    field = reader.fields.get(key)
    return int(field.contents()) if field is not None else 0


def _mean(sums: NDArray[np.float32], counts: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sums [experts, k] over counts [experts]; columns of an expert that no token reached weigh the same."""
    counts = np.rint(counts).reshape(-1, 1)
    per_expert = sums.reshape(counts.size, -1)
    seen = counts > 0
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
