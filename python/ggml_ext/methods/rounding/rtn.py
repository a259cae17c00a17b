"""To the nearest level, whatever the inputs."""

from __future__ import annotations

from collections.abc import Callable

from ggml_ext.methods.rounding.grid import Bytes, Floats
from ggml_ext.methods.rounding.hessian import Hessian
from ggml_ext.runtime import native


def encode(
    w: Floats,
    type_name: str,
    hessian: Hessian | None = None,
    *,
    importance: Floats | None = None,
    threads: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Bytes:
    """Encodes w float32 [rows, n] as the type's own encoder does, weighted by the columns' importances
    float32 [n] if there are any. progress is called with the number of weights done."""
    n = w.shape[1]
    advance = None if progress is None else lambda rows: progress(rows * n)
    return native.quantize(type_name, w, importance, threads=threads, progress=advance)
