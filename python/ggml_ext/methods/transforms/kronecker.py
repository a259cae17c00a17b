"""A site's transform as learnable parameters, applied in float32 without ever forming T."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ggml_ext.methods.sites import Site, SiteTransform, hadamard
from ggml_ext.methods.transforms.diagonal import centred, expand, reduce_mean
from ggml_ext.methods.transforms.structure import stored


class Factors:
    """T = diag^-1 (I (x) head)(left (x) right) with parameters in float64: the logarithm of the foldable
    diagonal, and head, left, right as free matrices; an implicit Hadamard matrix stays what it is."""

    def __init__(self, site: Site, start: SiteTransform) -> None:
        self._site = site
        self._hadamard_order = start.hadamard
        device = site.linears[0].weight.device
        self._fixed_diag = start.diag.to(device)
        self.parameters: dict[str, Tensor] = {}
        if site.fold is not None:
            self.parameters["diag"] = reduce_mean(site, self._fixed_diag.log())
        for name in ("head", "left", "right"):
            matrix = getattr(start, name)
            if matrix is not None:
                self.parameters[name] = matrix.detach().to(device, copy=True)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self._hadamard = _walsh_hadamard(start.hadamard, device)

    def inputs(self, x: Tensor) -> Tensor:
        """x T for x float32 [m, n]."""
        return self._map(x, (-self._log_diag()).exp(), self.parameters)

    def weights(self, w: Tensor) -> Tensor:
        """W T^-T for W float32 [m, n]."""
        duals = {name: p.inverse().T for name, p in self.parameters.items() if name != "diag"}
        return self._map(w, self._log_diag().exp(), duals)

    def moments(self, h: Tensor) -> Tensor:
        """T^T H T for H float32 [n, n], symmetric to the last bit."""
        h = self.inputs(self.inputs(h).T)
        return (h + h.T) / 2

    def transform(self) -> SiteTransform:
        """The transform with its factors as the file stores them. Their scales are immaterial to the outputs:
        left and right get unit mean square rows, the diagonal and head a geometric mean of 1."""
        with torch.no_grad():
            parts = {name: p.detach().cpu() for name, p in self.parameters.items()}
        diag = expand(self._site, centred(parts["diag"].exp())) if "diag" in parts else self._fixed_diag.cpu()
        head = parts.get("head")
        if head is not None:
            head = head * (head.shape[0] ** 0.5 / head.norm())
        return SiteTransform(
            diag,
            head=head,
            left=_normalised(parts.get("left")),
            right=_normalised(parts.get("right")),
            hadamard=self._hadamard_order,
        )

    def _log_diag(self) -> Tensor:
        if "diag" in self.parameters:
            return expand(self._site, self.parameters["diag"])
        return self._fixed_diag.log()

    def _map(self, x: Tensor, gain: Tensor, matrices: dict[str, Tensor]) -> Tensor:
        x = x * gain.float()
        if "head" in matrices:
            head = matrices["head"].float()
            x = (x.unflatten(-1, (-1, head.shape[0])) @ head).flatten(-2)
        if "right" in matrices:
            right = matrices["right"].float()
            x = (x.unflatten(-1, (-1, right.shape[0])) @ right).flatten(-2)
        elif self._hadamard is not None:
            one, two = self._hadamard
            x = x.unflatten(-1, (-1, one.shape[0], two.shape[0]))
            x = (one @ (x @ two)).flatten(-3)
        if "left" in matrices:
            left = matrices["left"].float()
            x = (left.T @ x.unflatten(-1, (left.shape[0], -1))).flatten(-2)
        return x


def _walsh_hadamard(order: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """The Walsh-Hadamard matrix as a Kronecker product of two of about the square root of its order: both are
    symmetric, and it is its own dual."""
    if order <= 1:
        return None
    exponent = int(math.log2(order))
    one, two = exponent // 2, exponent - exponent // 2
    return hadamard(1 << one).float().to(device), hadamard(1 << two).float().to(device)


def _normalised(matrix: Tensor | None) -> Tensor | None:
    if matrix is None:
        return None
    return stored(matrix * (matrix.shape[0] ** 0.5 / matrix.norm()))
