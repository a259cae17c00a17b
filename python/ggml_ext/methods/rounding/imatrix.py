"""To the nearest level, with errors weighted by the mean squares of the inputs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ggml_ext.methods.rounding import rtn
from ggml_ext.methods.rounding.grid import Bytes, Floats
from ggml_ext.methods.rounding.hessian import Hessian

_LEAST = 1e-6  # of the mean


def encode(
    w: Floats,
    type_name: str,
    hessian: Hessian,
    *,
    threads: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Bytes:
    """Encodes w float32 [rows, n] for inputs with the second moments ``hessian``, whose diagonal counts."""
    importance = importances(hessian.measured)
    return rtn.encode(w, type_name, importance=importance, threads=threads, progress=progress)


def importances(hessian: torch.Tensor) -> Floats:
    """The diagonal, float32 [n]. Channels that were never active count a little: ggml's encoders write zeros
    where all importances are 0."""
    diagonal: Floats = hessian.diagonal().float().numpy()
    mean = float(diagonal.mean())
    return np.maximum(diagonal, _LEAST * mean) if mean != 0 else np.ones_like(diagonal)
