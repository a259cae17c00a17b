"""What a transform is solved for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.methods.sites import ActivationSpec, Linear


@dataclass(frozen=True)
class TransformRequest:
    """``name``: one of registry.TRANSFORMS. ``types``: the ggml type of each matrix, by GGUF tensor name.
    ``activation``: how activations are rounded at run time; 16 bits or more stand for not at all.
    ``budget_bits``: bits per weight of a site's matrices that its stored factors may take, None for no limit.
    ``rounding``: how the matrices will be rounded; gptq leaves another error to minimise than the others.
    ``alpha``: share of the activations in a SmoothQuant diagonal; None for the transform's own choice
    (smoothquant 0.5, hadamard no diagonal, flatquant 0.3). ``steps``: of Adam on the closed-form loss.
    ``search_clip``: look for the best clip; None for activations of 4 bits only."""

    name: str
    types: Mapping[str, str]
    activation: ActivationSpec = field(default_factory=ActivationSpec)
    budget_bits: float | None = None
    rounding: str = "gptq"
    alpha: float | None = None
    steps: int = 25
    search_clip: bool | None = None
    seed: int = 0

    @property
    def clips(self) -> bool:
        """Whether clips are searched. At 8 bits they gain nothing (docs/flatquant.md)."""
        return self.activation.bits <= 4 if self.search_clip is None else self.search_clip

    def type_of(self, linear: Linear) -> str:
        """The matrix's ggml type. Raises GgmlExtError if the request does not name it."""
        if linear.tensor not in self.types:
            raise GgmlExtError(f"{linear.tensor}: no type was chosen for it; name one in the request's types")
        return self.types[linear.tensor]
