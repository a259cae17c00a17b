"""What calibration leaves of one block: its tensors as they go into the GGUF file, and what was found out.

A checkpoint is a safetensors file. Every tensor is uint8 [rows, bytes per row] under its GGUF name; one
metadata entry, JSON, has the rest. It is written whole or not at all, and equal content gives equal bytes:
no times, no paths.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ggml_ext.atomic import atomic_path
from ggml_ext.errors import GgmlExtError
from ggml_ext.sites import SITE_KINDS

_ENTRY = "ggml_ext.block"


@dataclass(frozen=True)
class Folded:
    """The offline part of a block's transforms (fold.py), rounded to float32. ``diagonals``: per site, in the
    order of SITE_KINDS, what its channels were divided by; empty for ones. ``head``: row after row, the
    matrix that each head of v was multiplied by; empty for the identity."""

    diagonals: tuple[tuple[float, ...], ...]
    head: tuple[float, ...] = ()


@dataclass(frozen=True)
class Findings:
    """What calibration found out about a block. ``hadamard``, ``clip``: one per site, in the order of
    SITE_KINDS. ``errors``: GGUF name -> relative squared error of the matrix's output on the calibration
    text. ``notes``: site -> figures of its transform. ``folded``: what went into the weights, None where an
    older version did not write it down."""

    hadamard: tuple[int, ...] = (0,) * len(SITE_KINDS)
    clip: tuple[float, ...] = (1.0,) * len(SITE_KINDS)
    errors: dict[str, float] = field(default_factory=dict)
    notes: dict[str, dict[str, float]] = field(default_factory=dict)
    folded: Folded | None = None


@dataclass(frozen=True)
class Packed:
    """A tensor of the GGUF file. ``dims``: GGUF order, dims[0] is the row length in weights. ``data``: uint8
    [rows, bytes per row], rows in the file's order."""

    type_name: str
    dims: tuple[int, ...]
    data: NDArray[np.uint8]


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint, its data still in the file. ``type_name``, ``dims``: as in Packed."""

    path: Path
    name: str
    type_name: str
    dims: tuple[int, ...]

    def read(self) -> NDArray[np.uint8]:
        """uint8 [rows, bytes per row]. Raises GgmlExtError for a file that has gone or changed."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="np") as file:
                return cast("NDArray[np.uint8]", file.get_tensor(self.name))
        except (OSError, SafetensorError) as exc:
            raise _damaged(self.path, exc) from exc


def block_path(folder: Path, index: int) -> Path:
    """The checkpoint of block ``index`` in a calibration's folder."""
    return folder / f"block-{index:03}.safetensors"


def save(path: Path, tensors: dict[str, Packed], findings: Findings) -> None:
    """Writes the checkpoint atomically. Raises GgmlExtError if the disk is full or read-only."""
    from safetensors.numpy import save_file

    described = {name: {"type": tensor.type_name, "dims": tensor.dims} for name, tensor in tensors.items()}
    entry = json.dumps({"tensors": described, **asdict(findings)}, sort_keys=True)
    data = {name: np.ascontiguousarray(tensor.data) for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(data, temporary, metadata={_ENTRY: entry})


def load(path: Path) -> tuple[dict[str, Stored], Findings]:
    """Reads a checkpoint's description. Raises GgmlExtError for a missing or damaged one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            entry: dict[str, Any] = json.loads((file.metadata() or {})[_ENTRY])
        tensors = {
            name: Stored(path, name, described["type"], tuple(described["dims"]))
            for name, described in entry.pop("tensors").items()
        }
        folded = entry.pop("folded", None)
        if folded is not None:
            folded = Folded(tuple(map(tuple, folded["diagonals"])), tuple(folded["head"]))
        hadamard, clip = tuple(entry.pop("hadamard")), tuple(entry.pop("clip"))
        return tensors, Findings(hadamard, clip, folded=folded, **entry)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as exc:
        raise _damaged(path, exc) from exc


def _damaged(path: Path, exc: Exception) -> GgmlExtError:
    return GgmlExtError(f"{path}: not a complete checkpoint ({exc}); delete it and calibrate again")
