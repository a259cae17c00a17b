"""How the weights of a matrix are rounded to a type: to nearest, by importance, or for the least error of
the layer's output. docs/rounding.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ggml_ext import native
from ggml_ext.rounding.gptq import round_gptq
from ggml_ext.rounding.grid import Bytes, Floats
from ggml_ext.rounding.hessian import Hessian

NAMES = ("rtn", "imatrix", "gptq")


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
    """Encodes w float32 [rows, n] with the method "rtn", "imatrix" or "gptq".

    hessian: second moments of the matrix's inputs; only rtn does without. Float types are copies, whatever
    the method. progress is called with the number of weights done. Raises GgmlExtError for what the method or
    the type cannot do.
    """
    if method == "gptq" and type_name not in _FLOATS:
        assert hessian is not None
        data = round_gptq(w, type_name, hessian, threads=threads, progress=progress)
    else:
        importance = None
        if method != "rtn" and type_name not in _FLOATS:
            assert hessian is not None
            importance = _importances(hessian.measured)
        data = native.quantize(
            type_name,
            w,
            importance,
            threads=threads,
            progress=None if progress is None else lambda n: progress(n * w.shape[1]),
        )
    measured = None if hessian is None else hessian.measured
    return Rounded(data, relative_error(w, native.dequantize(type_name, data, w.shape[1]), measured))


def _importances(hessian: torch.Tensor) -> Floats:
    """The diagonal. Channels that were never active count a little: ggml's encoders write zeros where all
    importances are 0."""
    diagonal: Floats = hessian.diagonal().float().numpy()
    mean = float(diagonal.mean())
    return np.maximum(diagonal, _LEAST_IMPORTANCE * mean) if mean != 0 else np.ones_like(diagonal)


_LEAST_IMPORTANCE = 1e-6  # of the mean
_TINY = float(np.finfo(np.float32).tiny)
_FLOATS = ("f32", "f16", "bf16")


def relative_error(w: Floats, rounded: Floats, hessian: torch.Tensor | None) -> float:
    """tr(D H D^T) / tr(W H W^T) with D = rounded - w: the error of the layer's output; |D|^2 / |W|^2
    without H."""
    matrix, difference = torch.from_numpy(w), torch.from_numpy(rounded - w)
    if hessian is None:
        return float(difference.square().sum() / matrix.square().sum().clamp_min(_TINY))
    h = hessian.float()
    error, whole = ((m @ h * m).sum() for m in (difference, matrix))
    return float(error / whole.clamp_min(_TINY))
