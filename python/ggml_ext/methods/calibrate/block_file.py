"""What calibration leaves of a block, or of what is outside of them: the tensors as they go into the GGUF
file, and what was found out.

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

from ggml_ext.core.atomic import atomic_path
from ggml_ext.core.errors import GgmlExtError

_ENTRY = "ggml_ext.block"


@dataclass(frozen=True)
class FileSite:
    """A line of a file's table of sites (docs/gguf.md). ``readers``: GGUF tensors, of which the first
    ``online`` read what is transformed online. ``maker``: the matrix whose rows ``first`` to ``first`` +
    ``rows`` - 1, in value heads of ``head``, make the channels; "" where a norm does. ``diagonal``: what the
    channels were divided by, empty for ones; ``matrix``: row after row, what each head of v was multiplied
    by, empty for the identity; both rounded to float32."""

    readers: tuple[str, ...]
    online: int
    maker: str = ""
    first: int = 0
    rows: int = 0
    head: int = 0
    hadamard: int = 0
    clip: float = 1.0
    diagonal: tuple[float, ...] = ()
    matrix: tuple[float, ...] = ()


@dataclass(frozen=True)
class Findings:
    """What calibration found out about a block. ``sites``: those with a transform or a clip. ``errors``: GGUF
    name -> relative squared error of the matrix's output on the calibration text. ``notes``: site -> figures
    of its transform."""

    sites: tuple[FileSite, ...] = ()
    errors: dict[str, float] = field(default_factory=dict)
    notes: dict[str, dict[str, float]] = field(default_factory=dict)


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


def outside_path(folder: Path) -> Path:
    """The checkpoint of the matrices outside the blocks."""
    return folder / "outside.safetensors"


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
        lists = ("readers", "diagonal", "matrix")
        sites = tuple(
            FileSite(**{**site, **{name: tuple(site[name]) for name in lists}}) for site in entry.pop("sites")
        )
        return tensors, Findings(sites, **entry)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as exc:
        raise _damaged(path, exc) from exc


def _damaged(path: Path, exc: Exception) -> GgmlExtError:
    return GgmlExtError(f"{path}: not a complete checkpoint ({exc}); delete it and calibrate again")
