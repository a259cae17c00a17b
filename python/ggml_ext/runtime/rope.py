"""What RoPE has done to a node of a graph, and its undoing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.runtime.native import error_name, llama_library


@dataclass(frozen=True, eq=False)
class Rope:
    """``frequencies`` float64 [n / 2]: radians per position of each pair of the n first channels of a head,
    empty where nothing is turned. ``adjacent``: pairs are channels 2 i and 2 i + 1, and not i and i + n / 2.
    ``length``: what turned channels are multiplied by beside."""

    frequencies: NDArray[np.float64]
    adjacent: bool
    length: float

    def undo(self, x: NDArray[np.float32], positions: NDArray[np.int64]) -> NDArray[np.float64]:
        """x [tokens, heads, d] at ``positions`` [tokens] as it was before."""
        out, n = x.astype(np.float64), 2 * len(self.frequencies)
        pairs = (slice(0, n, 2), slice(1, n, 2)) if self.adjacent else (slice(0, n // 2), slice(n // 2, n))
        first, second = (out[..., channels] / self.length for channels in pairs)
        angle = (positions[:, None] * self.frequencies)[:, None]
        cos, sin = np.cos(angle), np.sin(angle)
        out[..., pairs[0]] = first * cos + second * sin
        out[..., pairs[1]] = second * cos - first * sin
        return out


def rope_of(tensor: int, channels: int) -> Rope:
    """Of the graph's node at the address ``tensor``, as long as the graph lives; without RoPE right before it
    nothing is turned. ``channels``: of a head, or more.

    Raises GgmlExtError for a form that cannot be undone, such as positions of several dimensions.
    """
    ffi, library = llama_library()
    frequencies = np.empty(channels // 2)
    adjacent, length = ffi.new("int32_t *"), ffi.new("float *")
    turned = library.ggml_ext_rope_of(
        ffi.cast("struct ggml_tensor *", tensor), ffi.from_buffer("double[]", frequencies), adjacent, length
    )
    if turned < 0:
        raise GgmlExtError(f"a form of RoPE that cannot be undone ({error_name(turned)})")
    return Rope(frequencies[: turned // 2].copy(), bool(adjacent[0]), float(length[0]))
