"""Reads single tensors out of the safetensors files of a Hugging Face folder.

With plain file reads, not memory maps, for the reason given in source.py."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ggml_ext import hf
from ggml_ext.errors import GgmlExtError

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class _Entry:
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class Checkpoint:
    """``names``: all tensors of the folder."""

    def __init__(self, folder: Path) -> None:
        """Raises GgmlExtError for a folder that is incomplete or whose weights are pickled."""
        self.folder = folder
        self._entries: dict[str, _Entry] = {}
        for path in hf.check(folder):
            if path.suffix != ".safetensors":
                raise GgmlExtError(
                    f"{path}: pickled weights cannot be read block by block; load the model with "
                    "transformers and save_pretrained() it to a new folder, which writes safetensors"
                )
            with path.open("rb") as file:
                start = 8 + struct.unpack("<Q", file.read(8))[0]
            for name, entry in hf.safetensors_header(path).items():
                offset = start + entry["data_offsets"][0]
                self._entries[name] = _Entry(path, entry["dtype"], tuple(entry["shape"]), offset)

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def read(self, name: str) -> Tensor:
        """The tensor as float32 in host memory. Raises GgmlExtError if it is missing or of another type."""
        entry = self._entry(name)
        dtype = _DTYPES[entry.dtype]
        count = int(np.prod(entry.shape, dtype=np.int64)) * dtype.itemsize
        data = np.fromfile(entry.path, np.uint8, count, offset=entry.offset)
        if data.size != count:
            raise GgmlExtError(f"{entry.path}: cut off within {name}; download it again")
        return torch.from_numpy(data).view(dtype).reshape(entry.shape).float()

    def read_rows(self, name: str, rows: Tensor) -> Tensor:
        """Rows [m] (int64) of a matrix as float32 [m, n]. The same errors."""
        entry = self._entry(name)
        dtype = _DTYPES[entry.dtype]
        shape = (entry.shape[0], entry.shape[1] * dtype.itemsize)
        table = np.memmap(entry.path, np.uint8, "r", entry.offset, shape)
        return torch.from_numpy(table[rows.numpy()]).view(dtype).float()

    def _entry(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise GgmlExtError(f"{self.folder}: no tensor {name}; download the model again")
        if entry.dtype not in _DTYPES:
            raise GgmlExtError(
                f"{entry.path}: {name} is stored as {entry.dtype}; calibrate the float model it was made from"
            )
        return entry
