"""How the weights of a matrix are rounded to a type: to nearest, by importance, or for the least error of
the layer's output. One module per rounding, with encode(w, type_name, hessian, ...); docs/rounding.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import numpy as np
import torch

from ggml_ext.core.registry import FLOAT_TYPES, ROUNDINGS
from ggml_ext.methods.rounding.grid import Bytes, Floats
from ggml_ext.methods.rounding.hessian import Hessian
from ggml_ext.runtime import native


@dataclass(frozen=True)
class Rounded:
    """``data`` uint8 [rows, row bytes]. ``error``: relative error, see ``relative_error``."""

    data: Bytes
    error: float


def round_matrix(
    w: Floats,
    type_name: str,
    method: str,
    hessian: Hessian | None,
    *,
    threads: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Rounded:
    """Encodes w float32 [rows, n] with a method of registry.ROUNDINGS.

    hessian: second moments of the matrix's inputs, None only where the method measures nothing. Float types
    are copies, whatever the method. progress is called with the number of weights done. Raises GgmlExtError
    for what the method or the type cannot do.
    """
    if type_name in FLOAT_TYPES:
        method = "rtn"
    assert hessian is not None or not ROUNDINGS[method].measures
    encode = import_module(f"{__name__}.{method}").encode
    data: Bytes = encode(w, type_name, hessian, threads=threads, progress=progress)
    measured = None if hessian is None else hessian.measured
    return Rounded(data, relative_error(w, native.dequantize(type_name, data, w.shape[1]), measured))


_TINY = float(np.finfo(np.float32).tiny)


def relative_error(w: Floats, rounded: Floats, hessian: torch.Tensor | None) -> float:
    """tr(D H D^T) / tr(W H W^T) with D = rounded - w: the error of the layer's output; |D|^2 / |W|^2
    without H."""
    matrix, difference = torch.from_numpy(w), torch.from_numpy(rounded - w)
    if hessian is None:
        return float(difference.square().sum() / matrix.square().sum().clamp_min(_TINY))
    h = hessian.float()
    error, whole = ((m @ h * m).sum() for m in (difference, matrix))
    return float(error / whole.clamp_min(_TINY))
