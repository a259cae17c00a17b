"""Matrices outside the blocks that read a site: the head above all, which often is the embedding, too.

They are rounded by what was observed, as the blocks' are, a slab of rows at a time: rows do not depend on
each other, and a head has as many as the vocabulary. No transform is put before them.

A tied embedding is read in two ways. As the head its rows w_j meet inputs with the second moments H, as the
embedding row j is itself what the first block gets. Of a row's error d both take their share,

    d H d^T / t  +  EMBEDDING |d|^2 / e        with t = sum_j w_j H w_j^T, e = sum_j |w_j|^2,

each use relative to its own size, so GPTQ gets H + EMBEDDING (t / e) 1. docs/rounding.md says what for.
"""

from __future__ import annotations

import numpy as np
import torch

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.progress import track
from ggml_ext.core.registry import ROUNDINGS
from ggml_ext.gguf.source import Tensor, float_slabs
from ggml_ext.methods.calibrate.block_file import Packed
from ggml_ext.methods.rounding import grid, round_matrix
from ggml_ext.methods.rounding.grid import Bytes, Floats
from ggml_ext.methods.rounding.hessian import Hessian
from ggml_ext.runtime import native
from ggml_ext.types.rules import EMBEDDINGS

EMBEDDING = 0.1
"""What a relative error of the embedding counts against the same of the head's output."""


def round_outside(
    tensor: Tensor, type_name: str, rounding: str, hessian: Hessian, *, threads: int = 0
) -> tuple[Packed, float]:
    """Rounds a matrix [rows, n] of the float model by a method of registry.ROUNDINGS that measures.

    hessian: of what it reads. Returns the encoding and the relative squared error of its output. Raises
    GgmlExtError for a matrix that its type cannot hold.
    """
    if ROUNDINGS[rounding].otherwise and not grid.supports(type_name):
        rounding = ROUNDINGS[rounding].otherwise
    output, size = _energies(tensor, hessian)
    used = hessian
    if tensor.name in EMBEDDINGS and size > 0:
        identity = torch.eye(tensor.row_length, dtype=torch.float64)
        used = Hessian(hessian.measured.double() + EMBEDDING * output / size * identity, hessian.shrinkage)
    data: list[Bytes] = []
    lost = 0.0
    with track(tensor.n_weights, tensor.name, "weights") as advance:
        for _, w in float_slabs(tensor):
            try:
                rounded = round_matrix(w, type_name, rounding, used, threads=threads, progress=advance)
            except GgmlExtError as exc:
                raise GgmlExtError(f"{tensor.name}: {exc}") from exc
            data.append(rounded.data)
            lost += _energy(native.dequantize(type_name, rounded.data, tensor.row_length) - w, hessian)
    packed = Packed(type_name, tensor.dims, np.concatenate(data))
    return packed, lost / output if output > 0 else 0.0


def _energies(tensor: Tensor, hessian: Hessian) -> tuple[float, float]:
    """sum_j w_j H w_j^T and sum_j |w_j|^2 over the rows w_j."""
    output = size = 0.0
    for _, w in float_slabs(tensor):
        output += _energy(w, hessian)
        size += float(np.square(w).sum(dtype=np.float64))
    return output, size


def _energy(rows: Floats, hessian: Hessian) -> float:
    """sum_j x_j H x_j^T over rows x_j."""
    x = torch.from_numpy(rows)
    return float((x @ hessian.measured.float() * x).sum(dtype=torch.float64))
