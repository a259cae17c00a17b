"""The hidden states between two blocks, on disk: what block k reads and block k-1 wrote.

A file holds samples * ctx * hidden values, float32 or bfloat16, no header: the plan knows the shape. Two of
them exist at a time, whatever the depth of the model.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ggml_ext.atomic import atomic_path
from ggml_ext.errors import GgmlExtError


def hidden_path(folder: Path, index: int) -> Path:
    """Where a calibration's folder has the hidden states that enter block ``index``."""
    return folder / f"hidden-{index:03}.bin"


class Hidden:
    """The hidden states that enter block ``index``: [samples, ctx, hidden] of ``dtype``, in ``path``."""

    def __init__(self, folder: Path, index: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.path = hidden_path(folder, index)
        self._shape = shape
        self._dtype = dtype

    @property
    def n_bytes(self) -> int:
        return math.prod(self._shape) * self._dtype.itemsize

    def exists(self) -> bool:
        """Whether the file is there; it is complete then."""
        return self.path.is_file()

    @contextmanager
    def writing(self) -> Iterator[Callable[[Tensor], None]]:
        """Yields ``put``, which takes all samples in order as [b, ctx, hidden]; the file appears at the end.

        Raises GgmlExtError for a full disk, and for NaN or Inf: the model is damaged, or its dtype too small.
        """
        with atomic_path(self.path) as temporary, temporary.open("wb") as file:

            def put(batch: Tensor) -> None:
                if not bool(torch.isfinite(batch).all()):
                    raise GgmlExtError(
                        f"{self.path.stem}: hidden states hold NaN or Inf; the model is damaged, "
                        "or needs --dtype f32"
                    )
                flat = batch.detach().to("cpu", self._dtype).contiguous().view(torch.uint8)
                file.write(flat.numpy().data)

            yield put
            if file.tell() != self.n_bytes:
                raise ValueError(f"{file.tell()} bytes of hidden states instead of {self.n_bytes}")

    def batches(self, size: int) -> Iterator[Tensor]:
        """The samples in order, [b, ctx, hidden] with b <= ``size``, read through a memory map.

        Raises GgmlExtError if the file is missing or has another size.
        """
        if not self.path.is_file() or self.path.stat().st_size != self.n_bytes:
            raise GgmlExtError(
                f"{self.path}: missing or damaged, the calibration cannot go on without it; "
                f"delete {self.path.parent} and start again"
            )
        flat = torch.from_file(str(self.path), size=math.prod(self._shape), dtype=self._dtype)
        yield from torch.split(flat.view(self._shape), size)

    def on(self, device: torch.device, size: int) -> Sequence[Tensor]:
        """The same batches as a sequence; each is copied to ``device`` when it is asked for."""
        return _OnDevice(list(self.batches(size)), device)

    def remove(self) -> None:
        """Deletes the file if it is there."""
        self.path.unlink(missing_ok=True)


class _OnDevice(Sequence[Tensor]):
    def __init__(self, batches: Sequence[Tensor], device: torch.device) -> None:
        self._batches = batches
        self._device = device

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        return self._batches[index].to(self._device)


def free_bytes(folder: Path) -> int:
    """Bytes that an ordinary user can still write on the folder's disk."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize
