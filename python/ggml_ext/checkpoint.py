"""Reads single tensors out of the safetensors files of a Hugging Face folder.

With plain file reads, not memory maps, for the reason given in source.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ggml_ext import hf
from ggml_ext.errors import GgmlExtError
from ggml_ext.hf_files import Entry, check_weights

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Checkpoint:
    """``names``: all tensors of the folder."""

    def __init__(self, folder: Path) -> None:
        """Raises GgmlExtError for a folder that is incomplete or whose weights are pickled."""
        self.folder = folder
        self._entries: dict[str, tuple[Path, Entry]] = {}
        weights = hf.check(folder)
        for path in weights:
            if path.suffix != ".safetensors":
                raise GgmlExtError(
                    f"{path}: pickled weights cannot be read block by block; load the model with "
                    "transformers and save_pretrained() it to a new folder, which writes safetensors"
                )
        for path, header in check_weights(weights).items():
            self._entries |= {name: (path, entry) for name, entry in header.items()}

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def read(self, name: str) -> Tensor:
        """The tensor as float32 in host memory. Raises GgmlExtError if it is missing or of another type."""
        path, entry = self._entry(name)
        data = np.fromfile(path, np.uint8, entry.end - entry.start, offset=entry.start)
        if data.size != entry.end - entry.start:
            raise GgmlExtError(f"{path}: cut off within {name}; download it again")
        return torch.from_numpy(data).view(_DTYPES[entry.dtype]).reshape(entry.shape).float()

    def read_rows(self, name: str, rows: Tensor) -> Tensor:
        """Rows [m] (int64) of a matrix as float32 [m, n]. The same errors, and one for rows that it lacks."""
        path, entry = self._entry(name)
        dtype = _DTYPES[entry.dtype]
        if len(entry.shape) != 2 or entry.shape[0] <= int(rows.max()):
            raise GgmlExtError(
                f"{path}: {name} has the shape {list(entry.shape)}, which has no row {int(rows.max())}; "
                "download the model again"
            )
        shape = (entry.shape[0], entry.shape[1] * dtype.itemsize)
        table = np.memmap(path, np.uint8, "r", entry.start, shape)
        return torch.from_numpy(table[rows.numpy()]).view(dtype).float()

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises GgmlExtError as read."""
        return self._entry(name)[1].shape

    def _entry(self, name: str) -> tuple[Path, Entry]:
        found = self._entries.get(name)
        if found is None:
            raise GgmlExtError(f"{self.folder}: no tensor {name}; download the model again")
        path, entry = found
        if entry.dtype not in _DTYPES:
            raise GgmlExtError(
                f"{path}: {name} is stored as {entry.dtype}; calibrate the float model it was made from"
            )
        return found
