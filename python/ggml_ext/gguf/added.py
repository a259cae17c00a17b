"""Writes a GGUF file anew with tensors beside its own, which pass through as they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from ggml_ext.core.atomic import atomic_path
from ggml_ext.core.progress import track
from ggml_ext.gguf.source import Tensor, open_gguf, read_bytes, reading
from ggml_ext.gguf.writer import OutTensor, padding, write_header
from ggml_ext.runtime import native

_TYPES = {np.dtype(np.float32): GGMLQuantizationType.F32, np.dtype(np.float16): GGMLQuantizationType.F16}
_SLAB_BYTES = 16 * 1024 * 1024


def _slabs(tensor: Tensor) -> list[tuple[int, int]]:
    rows = max(1, _SLAB_BYTES // max(tensor.row_bytes, 1))
    return [(at, min(rows, tensor.n_rows - at)) for at in range(0, tensor.n_rows, rows)]


def write_with(source: Path, added: Mapping[str, NDArray[np.floating]], out: Path) -> None:
    """The model ``source`` (its first part, if split) as one file ``out``, whole or not at all, with
    ``added``, float32 or float16, in the place of its tensors of those names, if any.

    Raises GgmlExtError as open_gguf does, for a file that changes meanwhile, and where ``out`` cannot be
    written.
    """
    model = open_gguf(source)
    kept = [tensor for tensor in model.tensors if tensor.name not in added]
    keys = {name: entry for name, entry in model.keys.items() if not name.startswith("split.")}
    outs = [
        OutTensor(tensor.name, tensor.dims, native.type_id(tensor.type_name), tensor.n_bytes)
        for tensor in kept
    ]
    outs += [
        OutTensor(name, values.shape[::-1], int(_TYPES[values.dtype]), values.nbytes)
        for name, values in added.items()
    ]
    total = sum(tensor.n_bytes for tensor in outs)
    with atomic_path(out) as path, path.open("wb") as file, track(total, out.name, "bytes") as advance:
        write_header(file, keys, outs, model.alignment)
        for tensor in kept:
            with reading(tensor) as data:
                for first, count in _slabs(tensor):
                    file.write(read_bytes(data, tensor, first, count).data)
                    advance(count * tensor.row_bytes)
            file.write(padding(tensor.n_bytes, model.alignment))
        for values in added.values():
            file.write(np.ascontiguousarray(values).data)
            file.write(padding(values.nbytes, model.alignment))
            advance(values.nbytes)
